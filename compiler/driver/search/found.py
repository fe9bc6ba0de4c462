"""What a search finds: a plan with what it costs, and those that come next."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from shardc.compiler.driver.search.budget import readable
from shardc.compiler.driver.search.costs import Costs
from shardc.compiler.plan.plan import Plan


@dataclass(frozen=True)
class Candidate:
    """A plan and the seconds of its step. recompute: patterns of the modules that backward computes again. least: bytes
    of a rank, below which its peak is not by much."""

    plan: Plan
    seconds: float
    least: float
    recompute: tuple[str, ...] = ()
    costs: Costs = field(compare=False, repr=False, kw_only=True)

    @cached_property
    def peak_bytes(self) -> int:
        """Of the rank that holds most: parameters, gradients, Adam's two moments, activations, and what collectives
        take, counted of the finished program, which is made when this is first asked for."""
        return self.costs.counted(self.plan, self.recompute)

    @property
    def text(self) -> str:
        """As it would be passed to compile."""
        return f"{self.plan}" + (f", recompute={list(self.recompute)}" if self.recompute else "")

    def __str__(self) -> str:
        return f"{self.seconds:.3g} s  {self.text}"


@dataclass(frozen=True)
class Found:
    """The plan with the shortest step that fits, and what follows it.

    seconds: of a step, by the objective of docs/deciding.md. peak_bytes: of the rank that holds most, counted of the
    finished program, with Adam's two moments. bound: seconds in which no plan does the step, that of the work shared
    out over all ranks. recompute: patterns for `compile(recompute=)`, where the plan fits only so. alternatives: other
    plans, the fastest first; those above the limit too.
    """

    plan: Plan
    seconds: float
    peak_bytes: int
    bound: float
    recompute: tuple[str, ...] = ()
    alternatives: tuple[Candidate, ...] = ()
    tried: int = 0

    def __str__(self) -> str:
        again = f"\nrecompute={list(self.recompute)}" if self.recompute else ""
        first = (
            f"{self.plan}{again}\n{self.seconds:.3g} s a step (at least {self.bound:.3g}), {readable(self.peak_bytes)}"
        )
        return "\n".join([f"{first} a rank; {self.tried} plans compared, and next:", *map(str, self.alternatives)])
