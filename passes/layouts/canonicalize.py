"""Fewer spellings, so fewer rules: a product with a bias becomes a product and a sum.

    %addmm: f32[8, 16] = aten.addmm(%bias, %x, %w)
  ==>
    %mm: f32[8, 16] = aten.mm(%x, %w)
    %add: f32[8, 16] = aten.add.Tensor(%mm, %bias)

    %back = aten.native_layer_norm_backward(%g, %x, [64], %mean, %rstd, %weight, %bias, [True, True, True])
  ==>
    %back = aten.native_layer_norm_backward(%g, %x, [64], %mean, %rstd, %weight, %weight, [True, True, True])

    %zeros = aten.zeros_like(%x)
    %sum = aten.index_add(%zeros, 0, %index, %rows)
  ==>
    %zeros = aten.zeros([16, 8], dtype=f32, device=cpu)
    %sum = aten.index_add(%zeros, 0, %index, %rows)

The backward of a layer norm takes a bias for its shape alone: with the weight in its place nobody gathers it again.
A product whose contracted dim is split is a pending sum, and a bias inside it would count once per rank. Zeros that
rows are added into lie as the sum does, not as what they were like. Left alone: scaled forms (alpha, beta other than
1), a bias of another kind than the weight, and zeros that something else reads. What nothing uses is dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, tensors, val
from shardc.compiler.ir.rewrite import emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.sizes import named_shape, of_data

aten = torch.ops.aten
PRODUCTS: dict[Any, Any] = {
    aten.addmm.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
    aten.addmv.default: aten.mv.default,
}
ADDED_INTO = (aten.index_add.default, aten.scatter_add.default)


@dataclass(frozen=True)
class Canonicalize:
    name = "canonicalize"
    takes = gives = Stage.TRACED
    exact = False  # a fused bias may round differently

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm, *PRODUCTS):
            if not any(scale != 1 for scale in node.kwargs.values()):
                _split_bias(node)
                changes[str(node.target)] += 1
        for node in call_nodes(gm, aten.native_layer_norm_backward.default):
            weight, bias = arguments(node)[5:7]
            if weight is not bias and _alike(weight, bias):
                node.update_arg(6, weight)
                changes["bias for its shape"] += 1
        for node in call_nodes(gm, aten.zeros_like.default):
            if all(user.target in ADDED_INTO and user.args[0] is node for user in node.users):
                _by_itself(node)
                changes["zeros by themselves"] += 1
        return PassResult(changes)


def _by_itself(node: Node) -> None:
    (zeros,) = tensors(node)
    if zeros.is_contiguous() and not of_data(named_shape(zeros)):
        with node.graph.inserting_before(node):
            about = {"dtype": zeros.dtype, "device": zeros.device}
            made = emit(aten.zeros.default, ([*zeros.shape],), node, about, value=val(node))
        replace(node, made)


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Node) or not isinstance(b, Node):
        return False
    (x,), (y,) = tensors(a), tensors(b)
    return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def _split_bias(node: Node) -> None:
    bias, left, right = node.args[:3]
    with node.graph.inserting_before(node):
        product = emit(PRODUCTS[node.target], (left, right), node, value=val(node))
        total = emit(aten.add.Tensor, (product, bias), node, value=val(node))
    replace(node, total)
