"""Of a chain of views only its ends matter.

    %t: f32[16, 8] = aten.t(%w)
    %t_1: f32[8, 16] = aten.t(%t)                             is %w
    %reshape: f32[4@dp, 32, 64] = aten.reshape(%x, [4@dp, 32, 64])
    %reshape_1: f32[4@dp, 32, 4, 16] = aten.reshape(%reshape, [4@dp, 32, 4, 16])
    %sum: f32[1, 64] = aten.sum.dim_IntList(%y, [0], True)
    %reshape_2: f32[64] = aten.reshape(%sum, [64])
  ==>
    %reshape_1: f32[4@dp, 32, 4, 16] = aten.reshape(%x, [4@dp, 32, 4, 16])
    %reshape_2: f32[64] = aten.sum.dim_IntList(%y, [0])

Autograd writes a view for every step back over a view, and each costs the host a call. Left alone: transposes of
different dims; reshapes that change the shape; sums whose kept dims something else needs, or whose reshape does more
than drop them; a reshape in backward of one in forward, which may be a copy; what begins or leaves a recomputed
region; what the caller gets, where that would be an input itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, of, specs, tensors, together
from shardc.compiler.ir.rewrite import replace, retarget
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

aten = torch.ops.aten
RESHAPE, SUM = aten.reshape.default, aten.sum.dim_IntList


@dataclass(frozen=True)
class ShortenViews:
    name = "shorten-views"
    takes = gives = Stage.LOCAL
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm):
            for kind, shorter in SHORTER.items():
                source = shorter(node)
                if source is not None:
                    replace(node, source)
                    changes[kind] += 1
                    break
            else:
                dropped = _without_kept_dims(node)
                changes["kept dims"] += dropped
                changes["chains"] += not dropped and _skip(node)
        return PassResult(changes)


def _twice(node: Node) -> Node | None:
    """What a transpose of a transpose shows."""
    inner = node.args[0] if node.args else None
    if node.target not in (aten.t.default, aten.transpose.int) or not isinstance(inner, Node):
        return None
    same = inner.target is node.target and set(arguments(inner)[1:]) == set(arguments(node)[1:])
    source = arguments(inner)[0] if same else None
    return source if source is not None and _may_use(node, source) and specs(source) == specs(node) else None


def _same(node: Node) -> Node | None:
    """What a reshape to the shape there is shows. It may lie in memory otherwise than the reshape would."""
    if node.target is not RESHAPE:
        return None
    source = arguments(node)[0]
    alike = specs(source) and specs(source) == specs(node) and tensors(source)[0].shape == tensors(node)[0].shape
    return source if alike and _may_use(node, source) else None


def _without_kept_dims(node: Node) -> bool:
    """Let a reshape that only drops the dims that a sum kept be a sum that drops them."""
    if node.target is not RESHAPE:
        return False
    total = arguments(node)[0]
    if total.target is not SUM or len(total.args) != 3 or not total.args[2] or total.kwargs or len(total.users) != 1:
        return False
    layout, rank = specs(total), len(tensors(total)[0].shape)
    gone = {d % rank for d in total.args[1]}  # pyright: ignore
    left = tuple(dim for d, dim in enumerate(layout[0].dims) if d not in gone) if layout else None
    if not gone or not specs(node) or specs(node)[0].dims != left or specs(node)[0].pending != layout[0].pending:
        return False
    if not together(total, node):
        return False
    retarget(node, SUM, total.args[:2])
    return True


def _skip(node: Node) -> bool:
    """Let a reshape start from what the reshape before it started from."""
    if node.target is not RESHAPE:
        return False
    inner = arguments(node)[0]
    if inner.target is not RESHAPE or not _may_use(node, arguments(inner)[0]):
        return False
    if (of(inner).phase, of(inner).data) != (of(node).phase, of(node).data):
        return False  # a reshape may be a copy: backward would need what it was made from as well
    retarget(node, RESHAPE, (arguments(inner)[0], *node.args[1:]))
    return True


def _may_use(node: Node, source: Node) -> bool:
    """A recomputed region begins with what it is given, and a result is no input."""
    if source.op == "placeholder":
        return not any(user.op == "output" for user in node.users)
    return len({of(n).region for n in (node, arguments(node)[0], source)}) == 1


SHORTER: dict[str, Callable[[Node], Node | None]] = {
    "transposes": _twice,
    "same": _same,
}
