"""Stages, passes and the runner: a pass contains only its idea, the runner does the chores."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch.fx import GraphModule

from shardc.compiler.graph import stays
from shardc.compiler.infer import Decisions
from shardc.compiler.mesh import Mesh
from shardc.compiler.signature import Signature
from shardc.compiler.spec import Spec
from shardc.compiler.text import text
from shardc.compiler.verify import Stage, verify

if TYPE_CHECKING:
    from shardc.compiler.resolved import Resolved


@dataclass(frozen=True)
class Context:
    """What passes may read: nothing here changes while they run, but for what they have decided before."""

    mesh: Mesh
    plan: Resolved
    signature: Signature
    average: bool = False  # real mesh: each rank's loss is its own mean, so gradients are averaged
    reduce: bool = True  # False: data-parallel gradient reductions are left out (no_sync)
    carries: Mapping[str, Spec] = field(default_factory=dict)  # layouts of gradients kept back, by FQN
    strict: bool = False
    rng: str = "counter"
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
    """One pass of one compilation: the source for the viewer, dumps and replay."""

    name: str
    stage: Stage
    before: str
    after: str
    changes: dict[str, int]
    notes: tuple[str, ...]
    seconds: float


def run_passes(
    gm: GraphModule,
    passes: Sequence[Any],
    ctx: Context,
    names: dict[str, str],
    last: Record | None = None,
) -> list[Record]:
    """Run passes in order on `gm`; verify, clean, stamp, time and record after each. last: what ran before."""
    records: list[Record] = []
    stage, shown = (last.stage, last.after) if last else (Stage.TRACED, text(gm, ctx.mesh, names))
    for step in passes:
        if step.takes > stage or step.gives < stage:
            raise AssertionError(f"{step.name} takes {step.takes.name}, the graph is {stage.name}")
        known, begin = set(gm.graph.nodes), time.perf_counter()
        result = step.run(gm, ctx)
        gm.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or stays(n))
        for node in gm.graph.nodes:
            if node not in known and node.op == "call_function":
                node.meta.setdefault("made_by", step.name)
        stage, before = step.gives, shown
        verify(gm, stage, ctx.mesh)
        shown = text(gm, ctx.mesh, names)
        seconds = time.perf_counter() - begin
        records.append(Record(step.name, stage, before, shown, dict(result.changes), result.notes, seconds))
    return records


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
