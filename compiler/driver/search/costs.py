"""What a plan costs, seconds and bytes of a rank, by running the pipeline on a model with fewer of its equal layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.decide import Deciding, Options
from shardc.compiler.driver.kept_gradients import ALL
from shardc.compiler.driver.precision import with_precision
from shardc.compiler.driver.recompute import mark_recomputed
from shardc.compiler.driver.search.budget import held_bytes, moments, state_bytes
from shardc.compiler.driver.search.fewer_layers import fewer_layers
from shardc.compiler.driver.search.saved import saved_bytes
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.infer.atoms import Atoms
from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.infer.objective import Objective, weighted
from shardc.compiler.ir.graph import call_nodes, copy_graph
from shardc.compiler.ir.marks import CONSTRAIN, MARK, parse_key
from shardc.compiler.ir.node import arguments, of
from shardc.compiler.ir.signature import Traced
from shardc.compiler.plan.plan import Plan
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh

SWEPT = ("choose-layouts",)  # what is left out where many plans are compared: it makes none dearer


class Estimate(NamedTuple):
    """Seconds of a step; bytes of a rank between forward and backward, or at the end: a step takes more, but little."""

    seconds: float
    nbytes: float


class Costs:
    """Of one traced model over a mesh. resolve: a plan met with the model."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        traced: Traced,
        stacks: Sequence[str],
        resolve: Callable[[Plan], Resolved],
        options: Options,
    ) -> None:
        self._model, self._mesh, self._options, self._resolve = model, mesh, options, resolve
        self._traced, self.fewer = traced, fewer_layers(traced, stacks)
        self._known, self._resolved = Decisions(), dict[str, Resolved]()
        self.canonical = self._deciding(self.resolved(Plan()), ()).canonical(self.fewer.short)
        self.atoms = Atoms(self.canonical.gm.graph.nodes, self._known)
        self._objective = Objective(mesh, options.hardware)

    @property
    def bound(self) -> float:
        """Seconds that the work takes if all ranks share it out and nothing moves: no plan does it in less."""
        nodes, weight = self.canonical.gm.graph.nodes, self.fewer.weight
        return sum(weight(node) * self._objective.shared_out(node) for node in nodes)

    def resolved(self, plan: Plan) -> Resolved:
        """Raises PlanError for one that the model cannot take."""
        text = repr(plan)
        if text not in self._resolved:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._resolved[text] = with_precision(self._resolve(plan), self._options.precision)
        return self._resolved[text]

    def estimate(self, plan: Plan, recompute: Sequence[str] = (), swept: bool = False) -> Estimate | None:
        """Of a step; None where the model cannot be laid out so. swept: every call by itself, which is quick."""
        try:
            deciding = self._deciding(self.resolved(plan), recompute, SWEPT if swept else ())
            copy = self._copy(self.canonical.gm, deciding.plan, deciding.options.recompute)
            found = deciding.laid_out(self.canonical, self.atoms, copy, self._known.anew())
        except (PlanError, ShardingError):
            return None
        objective, picked = Objective(self._mesh, self._options.hardware), found.applied()
        objective.shares(self._objective)
        weight = self.fewer.weight
        again = [n for n in picked if of(n).region and of(n).phase == "forward"]
        seconds = sum(weighted(found, objective, picked, nodes, weight) for nodes in (picked, again))
        held, state = held_bytes(deciding.plan), state_bytes(deciding.plan)
        return Estimate(seconds, max(held + saved_bytes(found, objective, weight), state))

    def peak(self, plan: Plan, recompute: Sequence[str] = ()) -> float:
        """Bytes of a rank, about: as if each equal layer took as much."""
        resolved = self.resolved(plan)
        return self.fewer.whole(lambda t: self._program(t, resolved, recompute).peak_bytes()) + moments(resolved)

    def counted(self, plan: Plan, recompute: Sequence[str] = ()) -> int:
        """Bytes of a rank, of the finished program of the whole model, and the optimizer's state."""
        made = self._program(self._traced, self.resolved(plan), recompute)
        return made.peak_bytes() + moments(made.plan)

    def _program(self, traced: Traced, plan: Resolved, recompute: Sequence[str]) -> Program:
        deciding = self._deciding(plan, recompute)
        copy = self._copy(traced.gm, plan, deciding.options.recompute)
        return deciding.program(Traced(copy, traced.signature), ALL)

    def _copy(self, gm: GraphModule, plan: Resolved, recompute: Sequence[str]) -> GraphModule:
        """As it would be traced for one plan: only the borders that it speaks of are marked."""
        copy = copy_graph(gm)
        for mark in call_nodes(copy, MARK):
            key = parse_key(arguments(mark)[1])
            if key.kind != CONSTRAIN and key.fqn not in plan.positional:
                mark.replace_all_uses_with(arguments(mark)[0])
                copy.graph.erase_node(mark)
        mark_recomputed(copy, recompute)
        return copy

    def _deciding(self, plan: Resolved, recompute: Sequence[str], without: Sequence[str] = ()) -> Deciding:
        without = (*self._options.without, *without)
        recompute = (*self._options.recompute, *recompute)
        options = replace(self._options, recompute=recompute, without=without)
        return Deciding(self._model, plan, self._mesh, options, lambda *moved: None)
