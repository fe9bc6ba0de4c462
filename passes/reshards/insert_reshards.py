"""Disagreement becomes explicit: a reshard node wherever an operand's layout is not the one needed.

    %mm: f32[8, 16]+tp = aten.mm(%x, %w)
    %relu: f32[8, 16] = aten.relu(%mm)                     relu is not linear
  ==>
    %reshard: f32[8, 16] = shardc.reshard(%mm, [8, 16])
    %relu: f32[8, 16] = aten.relu(%reshard)

A mark whose wish changes nothing disappears. One reshard serves all uses of a value in the same layout.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import arguments, map_operands, of, operands, spec
from shardc.compiler.ir.rewrite import emit, replace
from shardc.compiler.ir.text import excerpt
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.spec import Spec


@dataclass(frozen=True)
class InsertReshards:
    name = "insert-reshards"
    takes = Stage.SHARDED
    gives = Stage.RESHARDED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        made: dict[tuple[Node, Spec], Node] = {}
        for node in call_nodes(gm):
            if node.target is MARK:
                _replace_mark(node, changes)
            elif (wants := of(node).wants) is not None:
                if ctx.strict:
                    _refuse_unplanned(node, wants)
                if any(spec(n) != needed for n, needed in zip(operands(node), wants, strict=True)):
                    map_operands(node, lambda i, n, at=node, w=wants: _reshard(n, w[i], at, made, changes))
        return PassResult(changes)


def _refuse_unplanned(node: Node, wants: tuple[Spec, ...]) -> None:
    """Summing what the plan made pending is implied by the plan, and slicing is free; a gather is neither."""
    for value, needed in zip(operands(node), wants, strict=True):
        lost = [a for a in spec(value).axes() if needed.dim_of(a) != spec(value).dim_of(a)]
        if lost:
            raise ShardingError(
                f"%{node.name} needs %{value.name} as {needed}, and no plan entry gathers it over {', '.join(lost)}",
                where=of(node).where,
                excerpt=excerpt(node),
                help="state the layout there (a style's layouts, or shardc.constrain), or compile without strict=True",
            )


def _reshard(value: Node, needed: Spec, user: Node, made: dict, changes: Counter) -> Node:
    if spec(value) == needed:
        return value
    if (value, needed) not in made:
        made[value, needed] = _insert(value, needed, user)
        changes["reshard"] += 1
    return made[value, needed]


def _replace_mark(node: Node, changes: Counter) -> None:
    value = arguments(node)[0]
    if spec(value) != spec(node):
        why = "; ".join(dict.fromkeys(wish[3] for wish in of(node).wish))
        value = _insert(value, spec(node), node, why=why, unit=of(node).unit)
        changes["reshard"] += 1
    replace(node, value)


def _insert(value: Node, needed: Spec, user: Node, **said: Any) -> Node:
    """A reshard in front of a user. A sum belongs to the module that left it pending, all else to its user's."""
    like = value if spec(value).pending else user
    with user.graph.inserting_before(user):
        return emit(reshard, (value, needed), like, layout=needed, phase=of(user).phase, by_origin=False, **said)
