"""Fewer spellings, so fewer rules: a product with a bias becomes a product and a sum.

    %addmm: f32[8, 16] = aten.addmm(%bias, %x, %w)
  ==>
    %mm: f32[8, 16] = aten.mm(%x, %w)
    %add: f32[8, 16] = aten.add.Tensor(%mm, %bias)

    %back = aten.native_layer_norm_backward(%g, %x, [64], %mean, %rstd, %weight, %bias, [True, True, True])
  ==>
    %back = aten.native_layer_norm_backward(%g, %x, [64], %mean, %rstd, %weight, %weight, [True, True, True])

The backward of a layer norm takes a bias for its shape alone: with the weight in its place nobody gathers it again.
A product whose contracted dim is split is a pending sum, and a bias inside it would count once per rank.
Left alone: scaled forms (alpha, beta other than 1), and a bias of another kind than the weight. What nothing uses is
dropped.
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

aten = torch.ops.aten
PRODUCTS: dict[Any, Any] = {
    aten.addmm.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
    aten.addmv.default: aten.mv.default,
}


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
        return PassResult(changes)


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
