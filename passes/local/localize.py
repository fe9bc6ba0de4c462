"""Global shapes become per-rank shapes: the graph that each rank runs.

    %view: f32[8@dp, 4@tp, 16] = aten.view(%mm, [8, 4, 16])
  ==>
    %view: f32[8@dp, 4@tp, 16] = aten.view(%mm, [8@dp, 4@tp, 16])

What the compiler itself put there (`shardc.draw`) is spelled out in ATen operators, also where it is whole.
Sizes that differ between ranks stay written as what they are and are bound when the program is loaded.
What an operator needs beyond local operands stands beside its rule, as its localize function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.infer.decisions import Decisions, call_rule
from shardc.compiler.infer.infer import Decision, OpRule, decided
from shardc.compiler.ir.collectives import all_reduce, fetch, indices_of, make_partial
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import local_value, of, operands, specs
from shardc.compiler.ir.rewrite import become, emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import RESHAPES
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.rank_numbers import bind, local_place, local_size, local_start, local_stop
from shardc.compiler.spec.spec import Spec, axes_of, chunk, size_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Localize:
    name = "localize"
    takes = Stage.RESHARDED
    gives = Stage.LOCAL
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        return PassResult(self.run_on(gm, ctx.mesh, ctx.decisions))

    def run_on(self, gm: GraphModule, mesh: Mesh, known: Decisions | None = None) -> Counter:
        """Localize a graph whose nodes have layouts; all it needs to know is the mesh."""
        changes: Counter = Counter()
        for node in call_nodes(gm):
            if node.target in RESHAPES:
                node.target = aten.reshape.default  # a piece may lie in memory otherwise than the whole
            rule = call_rule(node, known) if hasattr(node.target, "overloadpacket") else None
            if rule is None or not (_differs(node) or getattr(node.target, "namespace", "") == "shardc"):
                continue
            changes["localized"] += _localize(gm, node, rule, mesh)
        return changes


def _differs(node: Node) -> bool:
    """Whether any operand or result is split here: whole calls are local as they stand."""
    return any(s.axes() for n in (node, *operands(node)) for s in specs(n))


def _localize(gm: GraphModule, node: Node, rule: OpRule, mesh: Mesh) -> bool:
    decision = decided(rule, [spec for n in operands(node) for spec in specs(n)], specs(node), mesh)
    site = GraphSite(gm, node, rule, decision, mesh)
    if rule.localize is None:
        if rule.shape_arg is None or not decision.results[0].axes():
            return False
        args = list(node.args)
        args[rule.shape_arg] = site.result_shape()
        node.args = tuple(args)
        return True
    with gm.graph.inserting_before(node):
        result = rule.localize(site)
    if result is not node:
        _replace(node, result)
    return True


def _replace(node: Node, result: Any) -> None:
    """Put what a localize function returned (a node, or one per result) in the node's place."""
    if isinstance(result, Node):
        become(result, node, origin=node.name, made_by=of(node).made_by)
    else:
        for user in node.users:
            if isinstance(new := result[user.args[1]], Node):
                become(new, user, origin=user.name)
    replace(node, result)


class GraphSite:
    """The `Site` that emits into a graph."""

    def __init__(self, gm: GraphModule, node: Node, rule: OpRule, decision: Decision, mesh: Mesh) -> None:
        self._gm, self._node, self._rule, self._decision, self._mesh = gm, node, rule, decision, mesh
        self._factors = dict(decision.factors)
        self.args: tuple[Any, ...] = tuple(node.args)
        self.kwargs: Mapping[str, Any] = dict(node.kwargs)

    def split(self, factor: str) -> bool:
        return bool(axes_of(self._factors[factor]))

    def size(self, factor: str) -> Any:
        return local_size(self._factors[factor])

    def start(self, factor: str) -> Any:
        return local_start(self._factors[factor])

    def stop(self, factor: str) -> Any:
        return local_stop(self._factors[factor])

    def runs(self, factor: str) -> list[tuple[int, Any, Any]]:
        return [(part.size, local_start((part,)), local_size((part,))) for part in self._factors[factor]]

    def full(self, factor: str) -> int:
        return size_of(self._factors[factor])

    def place(self, factor: str) -> Any:
        return local_place(self._factors[factor])

    def ways(self, factor: str) -> int:
        return math.prod(self._mesh[a] for a in axes_of(self._factors[factor]))

    def least(self, factor: str) -> int:
        last = {a: self._mesh[a] - 1 for a in axes_of(self._factors[factor])}
        return math.prod(chunk(part.size, self._mesh, part.axes, last)[1] for part in self._factors[factor])

    def may_be_empty(self, factor: str) -> bool:
        return self.least(factor) == 0

    def result_shape(self, i: int = 0) -> list[Any]:
        return _shape(self._decision.results[i])

    def operand_shape(self, i: int = 0) -> list[Any]:
        return _shape(self._decision.operands[i])

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        on_meta = bind((args, kwargs), self._mesh, None, self._on_meta)
        return emit(op, args, self._node, kwargs, value=None, local=op(*on_meta[0], **on_meta[1]))

    def _on_meta(self, leaf: Any) -> Any:
        if isinstance(leaf, Node):
            return local_value(leaf, self._mesh)
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    def of_first_rank(self, x: Any) -> Any:
        for axis in self._mesh.names:
            if self._mesh[axis] > 1:
                x = self.call(all_reduce, self.call(make_partial, x, axis), axis)
        return x

    def fetch(
        self,
        x: Any,
        dim: int,
        factor: str,
        wanted: Callable[[int, int], Sequence[range]],
        of: str = "",
        fill: float | None = None,
    ) -> Any:
        axis, held = self._pieces(factor)
        _, aims = self._pieces(of or factor)
        runs = tuple(tuple((r.start, r.stop, r.step) for r in wanted(*aim) if len(r)) for aim in aims)
        if all(indices_of(mine) == list(range(i, i + n)) for mine, (i, n) in zip(runs, held, strict=True)):
            return x  # every rank wants what it has
        filled = () if fill is None else (fill,)
        return self.call(fetch, x, dim, axis, tuple(n for _, n in held), runs, *filled)

    def _pieces(self, factor: str) -> tuple[str, list[tuple[int, int]]]:
        """The one mesh dim that splits a factor, and (first index, size) of each piece."""
        ((part),) = self._factors[factor]
        (axis,) = part.axes
        return axis, [chunk(part.size, self._mesh, part.axes, {axis: i}) for i in range(self._mesh[axis])]

    def all_reduce(self, x: Any, factor: str, op: str = "sum") -> Any:
        for axis in axes_of(self._factors[factor]):
            x = self.call(all_reduce, x, axis, *(() if op == "sum" else (op,)))
        return x


def _shape(spec: Spec) -> list[Any]:
    return [local_size(dim) for dim in spec.dims]
