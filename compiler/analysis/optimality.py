"""How near a program is to the best that its plan allows, and what another choice at one call would cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import NamedTuple

from torch.fx import GraphModule

from shardc.compiler.infer.choose import choose
from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.infer.objective import Objective, around, total
from shardc.compiler.infer.strategies import Strategies, fixed
from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh


class Optimality(NamedTuple):
    """Estimated seconds of a step on one rank, what no layouts that the plan allows can do it in, and how much of the
    first lies between them."""

    cost: float
    bound: float
    gap: float


class Choices:
    """The layouts of a program, and those that it might have had. gm: the graph when its layouts were chosen."""

    def __init__(self, gm: GraphModule, mesh: Mesh, data_axes: Collection[str], hardware: Hardware) -> None:
        self._found = Strategies(gm, mesh, Decisions(), data_axes)
        self._objective = Objective(mesh, hardware)
        self._now = {node: ways[0] for node, ways in self._found.of.items()}
        self._by_name = {node.name: node for node in self._now}

    @cached_property
    def optimality(self) -> Optimality:
        cost = total(self._found, self._objective, self._now)
        bound = min(cost, choose(self._found, self._objective).bound)
        return Optimality(cost, bound, (cost - bound) / cost if cost else 0.0)

    def lines(self, name: str) -> Iterator[str]:
        """What the layouts of a call cost, and what the next best ones would."""
        node = self._by_name.get(name)
        if node is None or node.op == "placeholder" or fixed(node) or not self._found.of[node][1:]:
            return
        costs = [(around(self._found, self._objective, self._now, node, way), way) for way in self._found.of[node]]
        yield f"  chosen to cost {_micro(costs[0][0])} here, with what moves to it and from it"
        cost, other = min(costs[1:], key=lambda pair: pair[0])
        takes = ", ".join(map(str, other.operands))
        gives = ", ".join(map(str, other.results))
        yield f"  next best: {_micro(cost)}, taking {takes or 'nothing'} and giving {gives}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"
