"""Decides: a traced module goes through all passes and comes out as a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from shardc.compiler.analysis.program import Program
from shardc.compiler.analysis.work import by_place
from shardc.compiler.driver.calls.call_keys import held
from shardc.compiler.driver.kept_gradients import Sync
from shardc.compiler.driver.precision import border_casts
from shardc.compiler.errors import ShardingError
from shardc.compiler.infer.atoms import Atoms
from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.infer.open_splits import refinements
from shardc.compiler.infer.strategies import Laid
from shardc.compiler.ir.carry import add_carries
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.signature import Signature, Traced
from shardc.compiler.ir.text import input_names
from shardc.compiler.pipeline.runner import Context, Runner, run_until
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.pipeline.torch_trace import log_passes
from shardc.compiler.plan.layout import Precision
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.proof.reference import Original
from shardc.compiler.rules.ops import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.compiler.spec.hardware import NEUTRAL, Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec, to_placements
from shardc.passes.pipeline import first_passes, pipeline
from shardc.runtime.run.executable import autocast_state
from shardc.runtime.wire.distribute import whole

MOST_REPEATED = 0.02  # of all ranks' operations, under strict


@dataclass(frozen=True)
class Options:
    """What compile was told beside the model, the plan and the mesh. recompute: patterns; without: names of passes."""

    strict: bool = False
    recompute: tuple[str, ...] = ()
    rng: str = "counter"
    precision: Precision | None = None
    dynamic: bool = False
    backend: str | Callable[..., Any] = "eager"
    without: tuple[str, ...] = ()
    hardware: Hardware = NEUTRAL


def decide(traced: Traced, ctx: Context, original: Any = None) -> Program:
    """Run the whole pipeline on a traced module (its graph is consumed)."""
    gm, names = traced.gm, input_names(ctx.signature)
    global_gm = gm
    chosen, runner, records = None, Runner(gm, ctx, names), []
    for step in pipeline(ctx):
        if step.gives > Stage.SHARDED and chosen is None:
            chosen = copy_graph(gm)
        if step.gives >= Stage.LOCAL and global_gm is gm:
            global_gm = copy_graph(gm)
        records.append(runner.run(step))
    log_passes(records)
    made = Program(gm, global_gm, ctx.signature, ctx.mesh, ctx.plan, records, original, chosen, ctx.hardware)
    if ctx.strict:
        _refuse_repeated(made)
    return made


def _refuse_repeated(program: Program) -> None:
    """Raises ShardingError where ranks repeat more than a fiftieth of their work."""
    places = by_place(program.work())
    share = sum(part for *_, part in places)
    if share > MOST_REPEATED:
        fqn, where, most = places[0]
        raise ShardingError(
            f"ranks repeat {share:.0%} of their operations, {fqn} most of them ({most:.0%}), and strict=True allows "
            f"{MOST_REPEATED:.0%}",
            where=where,
            help="split it there (a style for the module, or shardc.constrain), or compile without strict=True",
        )


@dataclass
class Deciding:
    """One module's plan, mesh and options. moved: told of a parameter that is stored otherwise from now on, and of
    its layouts before and after."""

    module: nn.Module
    plan: Resolved
    mesh: Mesh
    options: Options
    moved: Callable[[str, Spec, Spec], None]
    settled: bool = False

    def program(self, traced: Traced, sync: Sync, decisions: Decisions | None = None) -> Program:
        """What the pipeline makes of a traced module (its graph is consumed). The first one settles how parameters
        are stored. decisions: those of other sizes, that are like these."""
        decisions = Decisions() if decisions is None else decisions
        if not self.settled:
            self._refine(self.canonical(traced), decisions)
        self.settled = True
        if sync.carries:
            traced = add_carries(traced, [name for name, _ in sync.carries])
        ctx = self._context(traced.signature, decisions, keep=frozenset(sync.keep), carries=dict(sync.carries))
        return decide(traced, ctx, self._original(traced.signature))

    def laid_out(self, canonical: Traced, atoms: Atoms, gm: GraphModule, decisions: Decisions) -> Laid:
        """A copy of a graph that the first passes have gone over (the copy is consumed), with every value's layout,
        before anything moves. atoms: of the graph itself."""
        self._refine(canonical, decisions, atoms)
        ctx = self._context(canonical.signature, decisions)
        run_until(Stage.SHARDED, pipeline(ctx)[len(first_passes(ctx)) :], gm, ctx)
        return Laid(gm, self.mesh, decisions)

    def canonical(self, traced: Traced) -> Traced:
        """A copy that the first passes have gone over."""
        copy, ctx = copy_graph(traced.gm), self._context(traced.signature, Decisions())
        for step in first_passes(ctx):
            step.run(copy, ctx)
        return Traced(copy, traced.signature)

    def _context(self, signature: Signature, decisions: Decisions, **sync: Any) -> Context:
        told = self.options
        options = {"strict": told.strict, "rng": told.rng, "without": told.without}
        costs = {"hardware": told.hardware, "decisions": decisions}
        return Context(self.mesh, self.plan, signature, **options, **costs, **sync)

    def _refine(self, canonical: Traced, decisions: Decisions, atoms: Atoms | None = None) -> None:
        """The first program shows which factor a style's open split falls on: store parameters so, rather than
        move them at every step. What torch has no placements for (uneven heads) stays as it is."""
        params = dict(self.plan.params)
        found = refinements(canonical.gm, canonical.signature, self.plan, self.mesh, decisions, atoms)
        for name, spec in found.items():
            before, layout = params[name].stored, params[name].computed_as(spec, self.mesh)
            if to_placements(layout.stored, self.mesh) is not None:
                self.moved(name, before, layout.stored)
                params[name] = layout
        self.plan = replace(self.plan, params=params)

    def _original(self, signature: Signature) -> Original:
        """The module as it is here, to prove the program by."""
        modes = tuple(m.training for m in self.module.modules())
        rng, precision = self.options.rng, self.options.precision
        casts = border_casts(self.module, precision)
        return Original(self.module, signature, self._values, modes, autocast_state(), rng, precision, casts)

    def _values(self) -> dict[str, Any]:
        return {fqn: whole(x) for fqn, x in held(self.module).items()}
