"""A product and its bias become one call again, where ranks agree on both.

    %mm: f32[8, 16@tp] = aten.mm(%x, %w)
    %add: f32[8, 16@tp] = aten.add.Tensor(%mm, %bias)
  ==>
    %add: f32[8, 16@tp] = aten.addmm(%bias, %x, %w)

`canonicalize` took them apart so that a product may be a pending sum. Left alone: a product that is pending, or used
elsewhere; a bias that is pending, that is no row, or whose row is one long where the product's is not; scaled sums;
other dtypes; a sum in another half or recomputed region than its product, or without its data-decided sizes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, operands, specs, tensors, together
from shardc.compiler.ir.rewrite import retarget
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseBias:
    name = "fuse-bias"
    takes = gives = Stage.LOCAL
    exact = False  # the bias may be added before the products are

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm, aten.add.Tensor):
            if node.kwargs or len(operands(node)) != 2:
                continue
            for product, bias in (operands(node), reversed(operands(node))):
                if _fits(node, product, bias):
                    left, right = arguments(product)
                    retarget(node, aten.addmm.default, (bias, left, right))
                    changes["biases"] += 1
                    break
        return PassResult(changes)


def _fits(node: Node, product: Node, bias: Node) -> bool:
    if product.target is not aten.mm.default or len(product.users) != 1 or not together(product, node):
        return False
    whole, row = specs(product), specs(bias)
    if len(whole) != 1 or len(row) != 1 or whole[0].pending or row[0].pending or specs(node) != whole:
        return False
    alike = len({x.dtype for n in (node, product, bias) for x in tensors(n)}) == 1
    return alike and row[0].dims == whole[0].dims[1:]
