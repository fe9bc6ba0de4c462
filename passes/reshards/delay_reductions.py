"""A sum of partial sums is reduced once, behind the last of them.

    %all_reduce: f32[8, 16] = shardc.all_reduce(%mm, tp)
    %add: f32[8, 16] = aten.add.Tensor(%x, %all_reduce)
    %all_reduce_1: f32[8, 16] = shardc.all_reduce(%mm_1, tp)
    %add_1: f32[8, 16] = aten.add.Tensor(%add, %all_reduce_1)
  ==>
    %add_2: f32[8, 16]+tp = aten.add.Tensor(%mm, %mm_1)
    %all_reduce_2: f32[8, 16] = shardc.all_reduce(%add_2, tp)
    %add_3: f32[8, 16] = aten.add.Tensor(%x, %all_reduce_2)

Two branches beside a residual (attention and MLP of a parallel block) then cost one message. Reductions are those of
one kind, mesh dim, dtype and layout: all_reduces, or reduce_scatters. Propagation has by then let sums travel through
every linear operator that makes them no larger; this takes what a larger whole operand stopped. Left alone: sums in
which only one summand is reduced; a reduction, or a sum in between, that is used elsewhere; scaled sums (alpha);
operands that the sum broadcasts or converts; reductions other than sums; what forward and backward do not share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import all_reduce, reduce_scatter
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, of, spec, tensors, together, val
from shardc.compiler.ir.rewrite import emit
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class DelayReductions:
    name = "delay-reductions"
    takes = gives = Stage.RESHARDED
    exact = False  # summands meet in another order

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm, ADD):
            if _is_plain(node) and not _goes_on(node):
                changes["reductions"] += _reduced_once(node)
        return PassResult(changes)


def _is_plain(node: Node) -> bool:
    """Whether a node adds two values of its own shape and dtype."""
    mine = tensors(node)[0]
    if node.target is not ADD or node.kwargs or len(node.args) != 2 or not all(isinstance(a, Node) for a in node.args):
        return False
    return all((x.shape, x.dtype) == (mine.shape, mine.dtype) for a in node.all_input_nodes for x in tensors(a))


def _goes_on(node: Node) -> bool:
    """Whether a sum is a summand of another one only, which then takes it up."""
    return len(node.users) == 1 and _belongs(node, next(iter(node.users)))


def _belongs(node: Node, user: Node) -> bool:
    return together(node, user) and user.target is ADD and _is_plain(user) and user.args[0] is not user.args[1]


def _summands(node: Node) -> Iterator[tuple[Node, Node]]:
    """(summand, the sum it is in) of a tree of sums, in order."""
    for x in arguments(node):
        if x.target is ADD and _is_plain(x) and len(x.users) == 1 and _belongs(x, node):
            yield from _summands(x)
        else:
            yield x, node


def _reduced_once(node: Node) -> int:
    """How many reductions are saved in one tree of sums."""
    leaves = list(_summands(node))
    groups: dict[Any, list[Node]] = {}
    for x, inside in leaves:
        if x.target in (all_reduce, reduce_scatter) and len(x.users) == 1 and _is_sum(x) and _shares(x, inside):
            key = (x.target, *x.args[1:], spec(x), spec(arguments(x)[0]), tensors(arguments(x)[0])[0].dtype)
            groups.setdefault(key, []).append(x)
    merged = [group for group in groups.values() if len(group) > 1]
    if not merged:
        return 0
    graph, rest = node.graph, [x for x, _ in leaves]
    with graph.inserting_before(node):
        for group in merged:
            total = arguments(group[0])[0]
            for x in group[1:]:
                total = _add(total, arguments(x)[0], node)
            first, why = group[0], of(group[0]).why
            once = emit(first.target, (total, *first.args[1:]), first, layout=spec(first), why=why)
            at = rest.index(group[-1])
            rest = [once if i == at else x for i, x in enumerate(rest) if x not in group or i == at]
        result = rest[0]
        for x in rest[1:]:
            result = _add(result, x, node)
    node.replace_all_uses_with(result)
    return sum(len(group) - 1 for group in merged)


def _is_sum(x: Node) -> bool:
    axis = next(i for i, a in enumerate(x.args) if isinstance(a, str))
    return x.args[axis + 1 :] in ((), ("sum",))


def _shares(x: Node, inside: Node) -> bool:
    return together(x, inside) and not of(x).unit


def _add(a: Node, b: Node, like: Node) -> Node:
    layout = spec(a)
    return emit(ADD, (a, b), like, value=val(like), layout=layout, wants=(layout, spec(b)))
