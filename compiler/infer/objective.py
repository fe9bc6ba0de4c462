"""What a choice of layouts costs a rank in seconds: the work of calls, and the collectives between layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from shardc.compiler.infer.strategies import Laid, Strategies, Strategy, Value, fixed
from shardc.compiler.ir.flops import global_flops
from shardc.compiler.ir.node import operands, shape, tensors
from shardc.compiler.rules.facts import computes
from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import of_data
from shardc.compiler.spec.spec import DTYPES, Spec, chunk
from shardc.compiler.spec.ways import sent_on_way

NEARLY_FREE = 1e-12  # seconds of a move within a rank: of two choices that cost the same, the one that moves less


@dataclass
class Objective:
    """Costs of one graph over a mesh on some machine, in seconds."""

    mesh: Mesh
    hardware: Hardware
    _flops: dict[Node, int] = field(default_factory=dict)
    _moved: dict[tuple[Spec, Spec, int], float] = field(default_factory=dict)
    _share: dict[Spec, float] = field(default_factory=dict)

    def shares(self, other: Objective) -> None:
        """Costs that do not depend on the graph are known to both."""
        self._moved, self._share = other._moved, other._share

    def call(self, node: Node, strategy: Strategy) -> float:
        """Of one call's own work on the rank that does most."""
        if fixed(node):
            return self.move(strategy.operands[0], strategy.results[0], itemsize((node, 0)))
        if node.op == "placeholder" or not computes(node.target):
            return 0.0
        if any(of_data(shape(n)) for n in operands(node)) or any(of_data(t.shape) for t in tensors(node)):
            return 0.0
        if node not in self._flops:
            self._flops[node] = global_flops(node)
        split = math.prod(self._part(dim) for _, dim in strategy.factors) if strategy.factors else 1.0
        values = [*[t for n in operands(node) for t in tensors(n)], *tensors(node)]
        layouts = [*strategy.operands, *strategy.results]
        touched = sum(t.numel() * t.element_size() * self.share(s) for t, s in zip(values, layouts, strict=True))
        return self.hardware.call(
            self._flops[node] * split, touched, DTYPES.get(values[-1].dtype, "") if values else ""
        )

    def shared_out(self, node: Node) -> float:
        """Of one call's work, if all ranks shared it out: no layouts do it in less."""
        if node.op == "placeholder" or fixed(node) or not computes(node.target):
            return 0.0
        values = [*[t for n in operands(node) for t in tensors(n)], *tensors(node)]
        if any(of_data(t.shape) for t in values):
            return 0.0
        touched = sum(t.numel() * t.element_size() for t in values)
        dtype = DTYPES.get(values[-1].dtype, "") if values else ""
        return self.hardware.call(global_flops(node) / self.mesh.size, touched / self.mesh.size, dtype)

    def least(self, found: Strategies) -> float:
        """Of all calls, if each did its own least work and nothing moved."""
        return sum(min(self.call(n, s) for s in ways) for n, ways in found.of.items() if not fixed(n))

    def move(self, source: Spec, target: Spec, itemsize: int) -> float:
        """Of one value on its way from one layout to another."""
        key = (source, target, itemsize)
        if key not in self._moved:
            self._moved[key] = 0.0
            for move, sent in sent_on_way(source, target, itemsize, self.mesh):
                axis = next(a for a in move.args if isinstance(a, str))
                self._moved[key] += self.hardware.collective(move.kind, sent, self.mesh, axis) if sent else NEARLY_FREE
        return self._moved[key]

    def share(self, layout: Spec) -> float:
        """What part of a value the rank that holds most has."""
        if layout not in self._share:
            self._share[layout] = math.prod(self._part(dim) for dim in layout.dims)
        return self._share[layout]

    def _part(self, dim: tuple) -> float:
        first = dict.fromkeys([a for part in dim for a in part.axes], 0)
        return math.prod(chunk(p.size, self.mesh, p.axes, first)[1] / p.size for p in dim if p.axes and p.size)


def total(found: Laid, objective: Objective, picked: Mapping[Node, Strategy]) -> float:
    """Of a whole graph that is laid out so."""
    return weighted(found, objective, picked, picked, lambda node: 1)


def weighted(
    found: Laid,
    objective: Objective,
    picked: Mapping[Node, Strategy],
    nodes: Collection[Node],
    weight: Callable[[Node], int],
) -> float:
    """Of some calls of a graph that is laid out so, and of what moves to them. weight: for how many a call stands."""
    calls = sum(weight(node) * objective.call(node, picked[node]) for node in nodes)
    return calls + sum(weight(v[0]) * cost for (v, _), cost in _moves(found, objective, picked, nodes).items())


def around(
    found: Strategies, objective: Objective, picked: Mapping[Node, Strategy], node: Node, way: Strategy
) -> float:
    """Of one call and of what moves at it, if it were laid out so and all others as they are."""
    takes = [user for r in range(len(way.results)) for user in found.uses[node, r]]
    beside = [user for operand in found.operands(node) for user in found.uses[found.value(operand)]]
    moved = _moves(found, objective, {**picked, node: way}, {*takes, *beside, node})
    return objective.call(node, way) + sum(moved.values())


def _moves(
    found: Laid, objective: Objective, picked: Mapping[Node, Strategy], users: Iterable[Node]
) -> dict[tuple[Value, Spec], float]:
    """Of bringing what they use to where they need it, once for all that need it so."""
    moves = {}
    for node in users:
        for operand, needed in zip(found.operands(node), picked[node].operands, strict=True):
            source, r = value = found.value(operand)
            moves[value, needed] = objective.move(picked[source].results[r], needed, itemsize(value))
    return moves


def itemsize(value: Value) -> int:
    return tensors(value[0])[value[1]].element_size()
