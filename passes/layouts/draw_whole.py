"""Random operators draw what one device would, whole on every rank (rng="replay").

    %rand_like: f32[8@dp, 16] = aten.rand_like(%x)
  ==>
    %zeros: f32[8, 16] = aten.zeros([8, 16], dtype=f32)
    %rand_like: f32[8, 16] = aten.rand_like(%zeros)

What an operand holds does not matter here, only how large it is and how it lies in memory, in which order torch
draws: zeros that lie likewise stand in for it. Of dropout, the mask is drawn so. Each rank then cuts
its part out. Left alone: operands that say what is drawn, or whose size data decides; they arrive whole.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import of, tensors, val
from shardc.compiler.ir.rewrite import emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

aten = torch.ops.aten
LIKE = (
    *(op.default for op in (aten.rand_like, aten.randn_like, aten.randint_like)),
    aten.randint_like.low_dtype, aten.bernoulli.p, aten.bernoulli.Tensor, aten.uniform.default,
    aten.normal_functional.default, aten.exponential.default, aten.geometric.default, aten.cauchy.default,
    aten.log_normal.default, aten.random.default, aten.random.to, getattr(aten.random, "from"),
)  # fmt: skip


@dataclass(frozen=True)
class DrawWhole:
    name = "draw-whole"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm):
            if of(node).data:
                continue
            dropout = node.target is aten.native_dropout.default
            if dropout or node.target in LIKE:
                (_mask if dropout else _stand_in)(node)
                changes[str(node.target)] += 1
        return PassResult(changes)


def _stand_in(node: Node) -> None:
    x = node.args[0]
    assert isinstance(x, Node)
    with node.graph.inserting_before(node):
        node.args = (_canvas(x, node), *node.args[1:])


def _canvas(x: Node, node: Node) -> Node:
    """Zeros that lie as x does: dense, with its dims in the order of their strides."""
    value = val(x)
    order = sorted(range(value.dim()), key=lambda d: -value.stride(d))
    shape = [value.shape[d] for d in order]
    given = {"dtype": value.dtype, "device": value.device}
    zeros = emit(aten.zeros.default, (shape,), node, given, value=value.new_zeros(shape))
    if order == sorted(order):
        return zeros
    back = [order.index(d) for d in range(value.dim())]
    return emit(aten.permute.default, (zeros, back), node)


def _mask(node: Node) -> None:
    """Dropout's mask is torch's; the product with it is written out."""
    x, p, train = (*node.args, None)[:3]
    assert isinstance(x, Node) and isinstance(p, float)
    _stand_in(node)
    out, _ = tensors(node)
    with node.graph.inserting_after(node):
        drawn = emit(operator.getitem, (node, 1), node)
    scale = 1.0 if train is False else 1 / (1 - p) if p < 1 else 0.0
    with node.graph.inserting_after(drawn):
        kept = emit(aten.mul.Tensor, (x, drawn), node, value=out)
    with node.graph.inserting_after(kept):
        result = emit(aten.mul.Scalar, (kept, scale), node, value=out)
    for user in [u for u in node.users if u is not drawn]:
        replace(user, result if user.args[1] == 0 else drawn)
