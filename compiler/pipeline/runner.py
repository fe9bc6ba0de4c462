"""Stages, passes and the runner: a pass contains only its idea, the runner does the chores."""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any, Protocol

from torch.fx import GraphModule, Node

from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.ir.node import parts, sign, stays
from shardc.compiler.ir.signature import Signature
from shardc.compiler.ir.text import Line, line
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.spec.hardware import NEUTRAL, Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec

if TYPE_CHECKING:
    from shardc.compiler.plan.resolved import Resolved


@dataclass(frozen=True)
class Context:
    """What passes may read: nothing here changes while they run, but for what they have decided before."""

    mesh: Mesh
    plan: Resolved
    signature: Signature
    keep: frozenset[str] = frozenset()  # parameters whose data-parallel reductions are left out (no_sync)
    carries: Mapping[str, Spec] = field(default_factory=dict)  # layouts of gradients kept back, by FQN
    strict: bool = False
    rng: str = "counter"
    without: tuple[str, ...] = ()  # passes that the user left out
    hardware: Hardware = NEUTRAL  # that costs are counted for
    decisions: Decisions = field(default_factory=Decisions, compare=False)


@dataclass(frozen=True)
class PassResult:
    """What a pass did: counts by kind, and notes for the report."""

    changes: Counter = field(default_factory=Counter)
    notes: tuple[str, ...] = ()


class Pass(Protocol):
    """A rewriting step; its options are its fields."""

    name: str
    takes: Stage
    gives: Stage
    exact: bool  # the values it leaves are bit for bit those it found

    def run(self, gm: GraphModule, ctx: Context) -> PassResult: ...


@dataclass(frozen=True)
class Record:
    """One pass of one compilation: the source for the viewer, dumps and replay. found, left: the program's lines before
    and after it, but for the first."""

    name: str
    stage: Stage
    mesh: Mesh
    found: tuple[Line, ...]
    left: tuple[Line, ...]
    changes: dict[str, int]
    notes: tuple[str, ...]
    seconds: float

    @property
    def before(self) -> str:
        return "\n".join([str(self.mesh), *map(str, self.found)])

    @property
    def after(self) -> str:
        return "\n".join([str(self.mesh), *map(str, self.left)])


class Runner:
    """Runs passes on `gm`, one after another: verifies, cleans, stamps, times and records after each.

    What a pass left alone is neither written nor verified again: a node that still consists of the same objects, which
    are all immutable. stage: of the graph as it is given.
    """

    def __init__(self, gm: GraphModule, ctx: Context, names: dict[str, str], stage: Stage = Stage.TRACED) -> None:
        self._gm, self._ctx, self._names, self._stage = gm, ctx, names, stage
        self._verified: Stage | None = None  # the stage whose invariants the graph was last seen to keep
        self._parts: dict[Node, tuple] = {}
        self._lines: dict[Node, Line] = {}
        self._write(self._changed())

    def run(self, step: Any) -> Record:
        """Run one pass."""
        if step.takes > self._stage or step.gives < self._stage:
            raise AssertionError(f"{step.name} takes {step.takes.name}, the graph is {self._stage.name}")
        begin, gm = time.perf_counter(), self._gm
        result = step.run(gm, self._ctx)
        _erase_dead(gm)
        for node in gm.graph.nodes:
            if node.op == "call_function":
                sign(node, step.name, new=node not in self._parts)
        found = tuple(self._lines.values())
        self._stage, changed = step.gives, self._changed()
        verify(gm, self._stage, self._ctx.mesh, changed if self._verified is self._stage else None)
        self._verified = self._stage
        self._write(changed)
        done, seconds = dict(result.changes), time.perf_counter() - begin
        left = tuple(self._lines.values())
        return Record(step.name, self._stage, self._ctx.mesh, found, left, done, result.notes, seconds)

    def _changed(self) -> list[Node]:
        """Nodes that are new, or have another part than when this was last asked."""
        was, self._parts = self._parts, {node: parts(node) for node in self._gm.graph.nodes}
        changed = [node for node, parts in self._parts.items() if not all(map(is_, parts, was.get(node, (None,))))]
        renamed = any(was[node][0] != node.name for node in changed if node in was)
        return list(self._parts) if renamed else changed  # a name is in the lines of its users too

    def _write(self, changed: Sequence[Node]) -> None:
        made = {node: line(node, self._names) for node in changed}
        self._lines = {node: made.get(node) or self._lines[node] for node in self._parts}


def run_until(stage: Stage, steps: Iterable[Any], gm: GraphModule, ctx: Context) -> None:
    """Run the passes that lead to the end of a stage, and nothing but them: who counts what a program would cost looks
    at no record of how it came about."""
    for step in itertools.takewhile(lambda step: step.gives <= stage, steps):
        step.run(gm, ctx)
        _erase_dead(gm)


def _erase_dead(gm: GraphModule) -> None:
    """As torch.fx's own, which looks through the whole graph for faults first; `verify` does that afterwards."""
    for node in reversed(gm.graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and not stays(node):
            gm.graph.erase_node(node)


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """Tracing makes millions of objects, and looking through them for cycles again and again takes a fifth of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
