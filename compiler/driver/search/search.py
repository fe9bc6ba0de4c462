"""search: the plan that makes a model's step shortest on a mesh, within a limit of memory."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import Node

from shardc.compiler.driver.calls.call_keys import Keys
from shardc.compiler.driver.decide import Options
from shardc.compiler.driver.search.budget import check_floor, limit, readable, state_bytes
from shardc.compiler.driver.search.candidates import Candidates
from shardc.compiler.driver.search.costs import Costs, Estimate
from shardc.compiler.driver.search.found import Candidate, Found
from shardc.compiler.driver.search.groups import groups
from shardc.compiler.driver.search.repeats import Repeats
from shardc.compiler.driver.search.spelling import Spelling
from shardc.compiler.driver.tracing import Tracing
from shardc.compiler.errors import PlanError
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.marks import MARK, parse_key
from shardc.compiler.ir.node import arguments
from shardc.compiler.ir.signature import Traced
from shardc.compiler.pipeline.runner import collecting_nothing
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.layout import Precision, bad_option, shown
from shardc.compiler.plan.match import Names
from shardc.compiler.plan.plan import Plan, as_plan
from shardc.compiler.plan.resolve import mesh_dims, resolve
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.trace.torch_internals import aside
from shardc.compiler.user_code import call_site

FINALISTS = 3  # of the plans compared call by call, how many are compared with layouts chosen together
NEXT = 4  # alternatives that are named
MARGIN = 0.95  # by which the first guess of bytes may be too high
SMALLEST = 6  # plans of which the bytes are counted where none fits
NEAR = 0.01  # of the seconds: plans that are as fast
Tell = Callable[[str, int], None]  # told of what is done, and how many plans were compared


def search(
    model: nn.Module,
    mesh: DeviceMesh | Mesh,
    inputs: Any,
    *,
    hardware: Hardware | str | None = None,
    memory: float | str | None = None,
    fixed: Any = None,
    precision: Precision | None = None,
) -> Found:
    """The plan whose step takes the least seconds on a mesh, among those that fit into memory (docs/deciding.md).

    model: an nn.Module, on meta if it likes; it is left as it is. mesh: a `shardc.Mesh` or a DeviceMesh. inputs:
    example inputs of global shapes: a tensor, a tuple of positional arguments, or a dict of keyword arguments; on meta
    will do. hardware: the machine that seconds are counted for, or a preset's name. memory: bytes of a rank, or text
    such as "80GB"; None: what the hardware has. fixed: a plan of which no line is changed: the search adds to it.
    precision: as for compile.

    What a step takes of memory: parameters, gradients, Adam's two moments, activations, and what collectives take.
    Where nothing fits, modules that repeat are computed again in backward: pass the result's `recompute` to compile.

    Raises PlanError for a limit that cannot be met, with the least that can be reached; and, before any work, for
    `fixed` that makes no sense, and a mesh, hardware or limit that is none.
    """
    try:
        if not isinstance(model, nn.Module):
            raise PlanError(f"search takes an nn.Module, not {shown(model)}", help="write search(model, mesh, inputs)")
        machine = Hardware.of(hardware)
        most = limit(memory, machine.capacity)
        if precision is not None and not isinstance(precision, Precision):
            raise bad_option("precision", precision, "a shardc.Precision")
        if not isinstance(mesh, (Mesh, DeviceMesh)):
            raise PlanError(f"mesh is {shown(mesh)}, which is no mesh", help="pass a DeviceMesh or a shardc.Mesh")
        options = Options(precision=precision, hardware=machine)
        integers = mesh if isinstance(mesh, Mesh) else Mesh.of(mesh)
        machine.check(integers)
        one = Search(model, integers, options, most, fixed)
        if isinstance(inputs, dict):
            return one.run((), inputs)
        return one.run(inputs if isinstance(inputs, tuple) else (inputs,), {})
    except PlanError as error:
        raise error.at(call_site()) from None


def planned(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, mesh: Mesh, options: Options, **layouts: Any
) -> tuple[Resolved, tuple[str, ...]]:
    """What `compile(model, "auto")` runs by, of its first call: the plan found, met with the model, and patterns of
    what is to be recomputed."""
    search = Search(model, mesh, options, options.hardware.capacity, layouts=layouts)
    found = search.run(args, kwargs)
    return search.costs.resolved(found.plan), (*options.recompute, *found.recompute)


class Search:
    """One search. most: bytes of a rank. layouts: of inputs and outputs, as compile takes them. tell: is told how it
    goes.

    Raises PlanError for a `fixed` that makes no sense, and where the state alone is above the limit.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        options: Options,
        most: float,
        fixed: Any = None,
        layouts: Mapping[str, Any] | None = None,
        tell: Tell = lambda text, count: None,
    ) -> None:
        self.model, self.mesh, self.most, self.tell = model, mesh, most, tell
        self.options = replace(options, strict=False, dynamic=False)
        self.fixed = as_plan(fixed, mesh.names)
        self._resolve = partial(resolve, module=model, mesh=mesh, **(layouts or {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._given: Resolved = self._resolve(self.fixed, strict=fixed is not None and bool(self.fixed.entries))
        check_floor(model, mesh, most)
        self.repeats = Repeats(model)
        self._known: dict[Any, Estimate | None] = {}

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
        """Of a call with these inputs, of global shapes. Raises PlanError where nothing fits."""
        with collecting_nothing(), aside():
            self.tell("tracing", 0)
            self.traced = self._traced(args, kwargs)
            self.costs = Costs(self.model, self.mesh, self.traced, self.repeats.outermost, self._resolve, self.options)
            ranked = self._ranked()
            self.tell("counting memory", len(self._known))
            best = self._first_that_fits(ranked)
            others = [c for c in ranked if repr(c.plan) != repr(best.plan)]
            return Found(
                best.plan, best.seconds, best.peak_bytes, min(self.costs.bound, best.seconds), best.recompute,
                tuple(others[:NEXT]), len(self._known),
            )  # fmt: skip

    def _traced(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
        """With the border of each module that owns parameters marked, so that any plan may speak of it. A module that
        takes one value as several arguments may ask whether they are one, as torch's attention does, and marks would
        make several of it: it has none, and no style."""
        names = Names(self.model)
        own = [m for m in names.modules if names.first(m) == m and (names.owned(m) or m in self._given.positional)]
        found = self._marked(own, args, kwargs)
        asking = _taking_one_as_several(found)
        if asking:
            found = self._marked([m for m in own if m not in asking], args, kwargs)
        return found

    def _marked(self, modules: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
        known = dict(self.model.named_modules())
        plan = replace(self._given, positional={m: Forward.of(known[m].forward).positional for m in modules})
        tracing = Tracing(self.model, plan, self.mesh, self.options, Keys(self.model), real=False)
        tracing.check(args, kwargs)
        return tracing.traced(args, kwargs, None)

    def _ranked(self) -> list[Candidate]:
        """All candidates, the fastest first; of equals the simplest."""
        found = [self._estimated(plan) for plan in self._candidates().plans()]
        made = sorted([c for c in found if c is not None], key=lambda c: c.seconds)
        if not made:
            raise PlanError("no plan was found for this model and mesh", help="fix less of it, or name a plan")
        first = [self._estimated(c.plan, swept=False) or c for c in made[:FINALISTS]]  # as the program will be
        return sorted([*first, *made[FINALISTS:]], key=lambda c: c.seconds)

    def _estimated(self, plan: Plan, recompute: tuple[str, ...] = (), swept: bool = True) -> Candidate | None:
        found = self._estimate(plan, recompute, swept)
        return found and Candidate(plan, found.seconds, found.nbytes, recompute, costs=self.costs)

    def _estimate(self, plan: Plan, recompute: tuple[str, ...] = (), swept: bool = True) -> Estimate | None:
        key = repr(plan), recompute, swept
        if key not in self._known:
            self.tell("comparing plans", len(self._known))
            self._known[key] = self.costs.estimate(plan, recompute, swept)
        return self._known[key]

    def _candidates(self) -> Candidates:
        noted = mesh_dims(None, self.model)
        kept: dict[str, object] = {**self.fixed.entries}
        pattern = self.repeats.pattern
        taken = {
            axis: {pattern(name) for name, layout in self._given.params.items() if axis in layout.keys}
            for axis in self.mesh.names
        }
        found = groups(self.costs.canonical, self.costs.atoms, pattern)
        spelling = Spelling(self.model, self.repeats, self.costs.canonical)
        axes = tuple(a for a in self.mesh.names if a not in noted or a in kept)
        machine, units = self.options.hardware, self.repeats.units
        return Candidates(axes, self.mesh, machine, found, spelling, units, kept, taken, self._estimate)

    def _first_that_fits(self, ranked: Sequence[Candidate]) -> Candidate:
        """The fastest below the limit, with or without computing again what repeats. Of those that are as fast, but for
        a hundredth, the one that says least."""
        left, units = list(ranked), self.repeats.units
        while left:
            near = self._near(left)
            fitting = next(filter(self._fits, near), None)
            if fitting is not None:
                return fitting
            # To compute again takes longer, so those that are slower than these need not be asked yet.
            smaller = [c for c in near if units and not c.recompute and self._at_rest(c) <= self.most]
            again = [self._estimated(c.plan, units) for c in smaller]
            left = sorted([*left[len(near) :], *filter(None, again)], key=lambda c: c.seconds)
        raise self._too_little(ranked)

    def _near(self, left: Sequence[Candidate]) -> list[Candidate]:
        """Of candidates in order, those that are as fast as the first: the one that says least comes first."""
        near = [c for c in left if c.seconds <= left[0].seconds * (1 + NEAR)]
        return sorted(near, key=lambda c: len(repr(c.plan)))

    def _fits(self, candidate: Candidate) -> bool:
        """Whether the finished program stays below the limit; asked of a shorter one, and first of none."""
        if math.isinf(self.most):
            return True
        if candidate.least * MARGIN > self.most:
            return False
        self.tell("counting memory", len(self._known))
        if self.costs.fewer.longer and self.costs.peak(candidate.plan, candidate.recompute) > self.most:
            return False
        return candidate.peak_bytes <= self.most

    def _at_rest(self, candidate: Candidate) -> int:
        return state_bytes(self.costs.resolved(candidate.plan))

    def _too_little(self, ranked: Sequence[Candidate]) -> PlanError:
        """Of what is smallest at rest, the least that a step takes."""
        smallest = sorted(ranked, key=self._at_rest)[:SMALLEST]
        tried = [replace(c, recompute=again) for c in smallest for again in dict.fromkeys(((), self.repeats.units))]
        least = min(tried, key=lambda c: self.costs.peak(c.plan, c.recompute))
        return PlanError(
            f"memory is {readable(self.most)} a rank, and the least that a plan was found for is "
            f"{readable(least.peak_bytes)} ({least.peak_bytes:,} bytes)",
            excerpt=least.text,
            help="take more ranks, more memory, or a smaller batch",
        )


def _taking_one_as_several(traced: Traced) -> set[str]:
    """The modules that some value enters as two arguments."""
    met: Counter[tuple[str, Node]] = Counter()
    for mark in call_nodes(traced.gm, MARK):
        key, (source, _) = parse_key(arguments(mark)[1]), arguments(mark)
        if key.kind == "in" and not key.grad:
            met[key.fqn, source] += 1
    return {fqn for (fqn, _), count in met.items() if count > 1}
