"""Binds: a program becomes a function of a caller's tensors, on all ranks simulated here or on this one for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.fx import GraphModule

from shardc.compiler.analysis.memory import kinds_on
from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.kept_gradients import Kept
from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.node import is_random, spec
from shardc.compiler.ir.owned import read_later
from shardc.compiler.ir.signature import InputKind, OutputKind
from shardc.compiler.rules.ops.random.distributions import SEED
from shardc.compiler.spec.spec import Spec
from shardc.runtime.run.compiled_stretches import Stretches
from shardc.runtime.run.engines import SimulatedRanks, ThisRank
from shardc.runtime.run.executable import Executable
from shardc.runtime.run.ranks import Ranks


def bind(program: Program, ranks: Ranks | None, backend: str | Callable[..., Any], ledger: Kept) -> Executable:
    """ranks: None where all are simulated. ledger: keeps what unsynchronised steps hold back."""
    parts, signature = program.halves, program.signature
    changed = {signature.outputs[i].of or 0 for i in signature.indices(OutputKind.MUTATION)}
    later = read_later(parts.forward, len(signature.indices(OutputKind.OUTPUT, OutputKind.MUTATION)))
    if ranks is None:
        engine, kept = SimulatedRanks(parts, signature, program.mesh, later & changed), {}
    else:
        kept, wraps = _gradients(program, ranks)
        engine = _this_rank(program, ranks, backend, wraps, changed)
    return Executable(signature, engine, kept, ledger, sorted(later - changed))


def _this_rank(program: Program, ranks: Ranks, backend: Any, wraps: Mapping[int, Any], changed: set[int]) -> ThisRank:
    parts, signature = program.halves, program.signature
    stretches = Stretches(backend) if backend != "eager" else None
    forward = ranks.bind(parts.forward, stretches, len(signature.indices(OutputKind.OUTPUT)), changed)
    late = [signature.inputs[i].name for i in signature.indices(InputKind.TANGENT, InputKind.CARRY)]
    backward = parts.backward and ranks.backward(parts.backward, late, program.hash, stretches)
    if stretches is not None:
        stretches.compile_all(kinds_on(parts, program.mesh, ranks.coords))
    results = len(signature.indices(OutputKind.OUTPUT, OutputKind.MUTATION))
    moving = ranks.moving(parts.forward, f"forward of program {program.hash[:12]}", _shared(program))
    early, drawing = _drawing(parts.forward, ranks), _drawing(parts.backward, ranks)

    @contextmanager
    def forward_and_draws(inputs: Sequence[Any]) -> Iterator[None]:
        with moving(inputs), ranks.drawing_alike():
            yield

    around = moving if early is nullcontext else forward_and_draws
    return ThisRank(forward, backward, results, wraps, around, lambda tangents: drawing())


def _drawing(half: GraphModule | None, ranks: Ranks) -> Callable[[], AbstractContextManager[None]]:
    """Around a half in which torch draws whole tensors, all ranks draw alike. (A seed agrees by itself.)"""
    nodes = half.graph.nodes if half is not None else ()
    return ranks.drawing_alike if any(is_random(n) and n.target is not SEED for n in nodes) else nullcontext


def _shared(program: Program) -> dict[str, list[int]]:
    """Of each mesh dim, the inputs that its ranks are given alike, by position."""
    given = enumerate(zip(placeholders(program.halves.forward), program.signature.inputs, strict=False))
    batch = [(i, spec(node)) for i, (node, entry) in given if entry.kind is InputKind.BATCH]
    return {a: [i for i, s in batch if a not in s.axes() and not s.pending] for a in program.mesh.names}


def _gradients(program: Program, ranks: Ranks) -> tuple[dict[int, tuple[str, Spec]], dict[int, Any]]:
    """Which gradients are kept back, and which become DTensors (those of DTensors)."""
    kept, wraps, ends = {}, {}, returned(program.gm)
    for i, place in enumerate(program.signature.indices(OutputKind.GRADIENT)):
        source = program.signature.inputs[program.signature.outputs[place].of or 0]
        if source.kind is not InputKind.PARAMETER or ends[place] is None:
            continue
        layout = program.plan.params[source.name]
        if spec(ends[place]).pending and not layout.local:
            kept[i] = source.name, spec(ends[place])
        elif program.plan.has_shards:
            wraps[i] = ranks.wrapper(layout.stored)
    return kept, wraps
