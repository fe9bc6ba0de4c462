"""A compiled program: the graph at every stage, what it moves and why, and the proof against one device."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.accounts import Collective, collectives_of
from shardc.compiler.averages import Averages
from shardc.compiler.dump import dump
from shardc.compiler.explain import cause, explain
from shardc.compiler.graph import copy_graph, returned, spec
from shardc.compiler.halves import Halves, halves
from shardc.compiler.memory import peak_bytes
from shardc.compiler.mesh import Mesh
from shardc.compiler.pipeline import Context, Record, Runner, Stage
from shardc.compiler.prove import prove
from shardc.compiler.resolved import Resolved
from shardc.compiler.rules import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.compiler.signature import InputKind, OutputKind, Signature
from shardc.compiler.text import text
from shardc.compiler.trace import Traced
from shardc.compiler.trace_log import log_passes
from shardc.passes.pipeline import pipeline


@dataclass(eq=False)
class Program:
    """One traced signature of a module, laid out over a mesh. `gm` is the last stage's joint graph."""

    gm: GraphModule
    global_gm: GraphModule  # the RESHARDED stage: runs on one device, collectives being identities
    signature: Signature
    mesh: Mesh
    plan: Resolved
    records: Sequence[Record]
    original: Any = None  # an `Original`: runs the unsharded module
    averages: Averages = Averages()  # by what gradients here are divided

    @classmethod
    def build(cls, traced: Traced, ctx: Context, original: Any = None) -> Program:
        """Run the whole pipeline on a traced module (its graph is consumed)."""
        gm, names = traced.gm, input_names(ctx.signature)
        global_gm = gm
        runner, records = Runner(gm, ctx, names), []
        for step in pipeline(ctx):
            if step.gives >= Stage.LOCAL and global_gm is gm:
                global_gm = copy_graph(gm)
            records.append(runner.run(step))
        log_passes(records)
        return cls(gm, global_gm, ctx.signature, ctx.mesh, ctx.plan, records, original, _averages(gm, ctx))

    def __str__(self) -> str:
        return text(self.gm, self.mesh, input_names(self.signature))

    def stage(self, name: str) -> str:
        """The program's text as it stood at the end of a stage: TRACED, SHARDED, RESHARDED, LOCAL, SCHEDULED."""
        try:
            wanted = Stage[name.upper()]
        except KeyError:
            raise ValueError(f"no stage {name!r}; stages are {', '.join(s.name for s in Stage)}") from None
        if wanted is Stage.TRACED:
            return self.records[0].before
        return [r.after for r in self.records if r.stage <= wanted][-1]

    @cached_property
    def hash(self) -> str:
        """Of the program's text: the same on every rank."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    @cached_property
    def halves(self) -> Halves:
        """Forward and backward graphs."""
        return halves(self.gm, self.signature)

    def collectives(self) -> list[Collective]:
        """What moves, forward first; what backward computes again moves in both."""
        names, nodes = input_names(self.signature), {n.name: n for n in self.gm.graph.nodes}

        def why(c: Collective) -> str:
            return c.why or cause(nodes[c.name].all_input_nodes[0], c.mesh_dim, names)

        forward, backward = self.halves.forward, self.halves.backward
        late = [c._replace(phase="backward") for c in collectives_of(backward, self.mesh)] if backward else []
        return [c._replace(why=why(c)) for c in [*collectives_of(forward, self.mesh), *late]]

    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment of forward and backward on the rank that holds most."""
        return peak_bytes(self.halves, self.mesh)

    def notes(self) -> list[str]:
        """What passes report: operators without a rule, for example."""
        return [note for record in self.records for note in record.notes]

    def explain(self, value: str) -> str:
        """Why a value has its layout: the chain of plan entries and rules. value: its name in the text."""
        return explain(self.gm, self.global_gm, value.removeprefix("%"), input_names(self.signature))

    def data(self) -> dict[str, Any]:
        """Everything the viewer shows, as plain data; docs/viewer.md describes it."""
        return dump(self, input_names(self.signature))

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write `data()` as JSON, to be looked at elsewhere: `shardc view program.json`."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.data(), file, separators=(",", ":"))

    def view(
        self, path: str | os.PathLike[str], *, compare: Program | None = None, title: str = "", links: str = "h100"
    ) -> None:
        """Write the viewer's page: one HTML file that opens offline. compare: another program to set beside this
        one. links: the machine that the timeline is estimated for, as in `shardc view --links`."""
        from shardc.tools.page import page  # the one edge into tools; it gets data only

        programs = [self.data()] if compare is None else [self.data(), compare.data()]
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(*programs, titles=(title,) if title else (), links=links))

    def verify(self, *inputs: Any, **kwargs: Any) -> Any:
        """Simulate all ranks on these global inputs and compare with the original module: outputs, every
        gradient, and every value in between. Raises ShardingError naming the first value that differs and
        its line; returns the largest relative difference."""
        return prove(self, inputs, kwargs)


def _averages(gm: GraphModule, ctx: Context) -> Averages:
    if not ctx.average:
        return Averages()
    ends = zip(returned(gm), ctx.signature.outputs, strict=True)
    layouts = {i: spec(n) for i, (n, e) in enumerate(ends) if e.kind is OutputKind.OUTPUT and isinstance(n, Node)}
    found = Averages.of(layouts, ctx.signature, ctx.plan, ctx.mesh)
    return replace(found, later=ctx.keep)


def input_names(signature: Signature) -> dict[str, str]:
    """What each placeholder is, for the program's text."""
    words = {InputKind.PARAMETER: "param", InputKind.BATCH: "input"}
    out = {}
    for entry in signature.inputs:
        word = words.get(entry.kind, entry.kind.value)
        of = f" of output {entry.of}" if entry.kind is InputKind.TANGENT else f" {entry.name}"
        out[entry.node] = (word + of).strip()
    return out
