"""The backward of log_softmax behind a negative log likelihood needs no sum over classes: the target tells it.

    %g: f32[8, 16@tp] = aten.nll_loss_backward(%go, %lsm, %target, None, 1, -100, %total)
    %dx: f32[8, 16@tp] = aten._log_softmax_backward_data(%g, %lsm, 1, f32)        sums %g over the classes
  ==>
    %row: f32[8] = -weight[target] * go / total, zero where ignored
    %dx: f32[8, 16@tp] = %g - exp(%lsm) * %row

Each row of %g has one entry, so its sum is known from the target on every rank, and split classes need no
reduction in backward. Left alone: gradients with another use that changes them, dims that are not the class dim,
casts to another dtype, rows whose number data decides.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, of, shape, val
from shardc.compiler.ir.rewrite import emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import RESHAPES

aten = torch.ops.aten
LOSSES = (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
MEAN = 1  # torch's code for reduction="mean"


@dataclass(frozen=True)
class FuseCrossEntropy:
    name = "fuse-cross-entropy"
    takes = gives = Stage.TRACED
    exact = False  # the row's sum is its one entry instead of a sum with zeros

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm, aten._log_softmax_backward_data.default):
            gradient, _, dim, dtype = arguments(node)
            views, loss = _through_views(gradient)
            if of(node).data or of(loss).data:
                continue
            if loss.target in LOSSES and _is_class_dim(node, loss, dim) and val(node).dtype == dtype:
                _rewrite(node, loss, views, dim % len(shape(node)))
                changes["cross_entropy"] += 1
        return PassResult(changes)


def _through_views(node: Any) -> tuple[list[Node], Node]:
    """The views a gradient went through, outermost last, and the call it came from."""
    views: list[Node] = []
    while isinstance(node, Node) and node.target in RESHAPES:
        views.insert(0, node)
        node = node.args[0]
    return views, node


def _is_class_dim(node: Node, loss: Node, dim: int) -> bool:
    """Whether classes are this dim both in the loss and, after its views, in the softmax."""
    rank, classes = len(shape(node)), 1 if len(shape(loss)) > 1 else 0
    moved = dim % rank
    same_size = shape(node)[moved] == shape(loss)[classes]
    outer_equal = _count(shape(node)[:moved]) == _count(shape(loss)[:classes])
    return same_size and outer_equal and val(node).dtype == val(loss).dtype


def _count(sizes: tuple[int, ...]) -> int:
    out = 1
    for n in sizes:
        out *= n
    return out


def _rewrite(node: Node, loss: Node, views: list[Node], dim: int) -> None:
    go, _, target, weight, reduction, ignored, total = arguments(loss)

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        return emit(op, args, node, kwargs)

    with node.graph.inserting_before(node):
        kept = call(aten.ne.Scalar, target, ignored)
        safe = call(aten.mul.Tensor, target, kept)
        if weight is None:
            scale = call(aten._to_copy.default, kept, dtype=val(loss).dtype)
        else:
            picked = call(aten.index.Tensor, weight, [safe])
            scale = call(aten.mul.Tensor, picked, kept)
        scale = call(aten.mul.Tensor, scale, call(aten.div.Tensor, go, total) if reduction == MEAN else go)
        # Not by the product alone: where all targets are ignored, total is zero and 0 * inf is no zero.
        dropped = call(aten.logical_not.default, kept)
        row = call(aten.neg.default, call(aten.masked_fill.Scalar, scale, dropped, 0))
        if views:
            sizes = list(shape(node))
            sizes[dim] = 1
            row = call(aten.view.default, row, sizes)
        else:
            row = call(aten.unsqueeze.default, row, dim)
        share = call(aten.mul.Tensor, call(aten.exp.default, node.args[1]), row)
        replace(node, call(aten.sub.Tensor, node.args[0], share))
