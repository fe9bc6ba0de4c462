"""Give every value a layout: seeds flow through the operators' rules in one sweep.

    %x: f32[8@dp, 32] = input                     the plan said dp
    %w: f32[32, 16@tp] = param w                  the plan said tp
    %mm: f32[8, 16] = aten.mm(%x, %w)
  ==>
    %mm: f32[8@dp, 16@tp] = aten.mm(%x, %w)

An operator without a rule, or with sizes that data decides, gets whole operands: right, and reported. Propagation
extends what is there and never invents a split. Where operands disagree the node only says what it needs (`wants`).
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.infer.border_layouts import behind_mark, forward_marks
from shardc.compiler.infer.decisions import call_rule, decide_node
from shardc.compiler.infer.orders import Open
from shardc.compiler.infer.rows import RowsByOrigin
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes, returned
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import (
    arguments,
    nbytes,
    of,
    operands,
    result_number,
    set_spec,
    set_specs,
    spec,
    specs,
    target_name,
)
from shardc.compiler.ir.text import excerpt
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec


@dataclass(frozen=True)
class Propagate:
    name = "propagate"
    takes = Stage.TRACED
    gives = Stage.SHARDED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        whole: set[str] = set()
        while True:
            try:
                return _sweep(gm, ctx, RowsByOrigin(ctx.mesh, ctx.decisions, whole))
            except Open as found:
                whole |= {of(order.source).where for order in found.orders}
                _forget(gm, ctx)


def _sweep(gm: GraphModule, ctx: Context, rows: RowsByOrigin) -> PassResult:
    """Raises Open where rows by origin reach what may need them otherwise."""
    changes, unknown = Counter(), Counter()
    forward = forward_marks(gm)
    for node in call_nodes(gm):
        if node.target is operator.getitem:
            _pick(node)
            rows.pick(node, result_number(*arguments(node)))
        elif rows.take(node):
            changes["by origin"] += of(node).by_origin
        elif node.target is reshard:
            set_spec(node, arguments(node)[1])
        elif node.target is MARK:
            _mark(node, forward.get(node), ctx.mesh)
        else:
            _call(node, ctx, unknown)
        changes["layouts"] += any(not s.is_whole for s in specs(node))
    rows.end(returned(gm))
    notes = tuple(f"{name} {why}: {n} calls run on whole operands" for (name, why), n in unknown.items())
    return PassResult(changes, notes)


def _forget(gm: GraphModule, ctx: Context) -> None:
    """Calls whose layouts were fixed are open again."""
    for node in call_nodes(gm):
        if of(node).fixed:
            of(node).fixed = of(node).by_origin = False
            if node.target is not operator.getitem:
                of(node).rule = ctx.decisions.rule(node)


def _pick(node: Node) -> None:
    source, index = arguments(node)
    set_spec(node, specs(source)[result_number(source, index)])


def _call(node: Node, ctx: Context, unknown: Counter) -> None:
    arriving = [_arriving(n, ctx) for n in operands(node)]
    decision = decide_node(node, arriving, ctx.mesh, ctx.plan.data_axes, ctx.decisions)
    if call_rule(node, ctx.decisions) is None and any(not s.is_whole for s in arriving):
        why = "decides sizes or numbers by data" if of(node).data else "has no rule"
        unknown[target_name(node.target), why] += 1
        if ctx.strict:
            raise _by_data(node) if of(node).data else _no_rule(node)
    of(node).wants = decision.operands
    set_specs(node, decision.results)


def _arriving(value: Node, ctx: Context) -> Spec:
    """A value's layout as its users meet it: a pending sum travels on only where what is made of it is no larger
    in all, since each of that would have to be summed instead. Over data-parallel mesh dims it always does, up to
    the gradients of parameters: there it is put off and put together with others."""
    layout = spec(value)
    if not layout.pending or sum(nbytes(user) for user in value.users) <= nbytes(value):
        return layout
    return layout.with_pending({a: op for a, op in layout.pending if a in ctx.plan.data_axes}, ctx.mesh)


def _mark(node: Node, partner: Node | None, mesh: Mesh) -> None:
    """A module boundary or constraint."""
    set_spec(node, behind_mark(node, spec(arguments(node)[0]), partner, mesh))
    if partner is not None:
        of(node).wish = of(partner).wish  # the reason, for reports


def _no_rule(node: Node) -> ShardingError:
    name = target_name(node.target)
    return ShardingError(
        f"{name} has no sharding rule, and strict=True allows none without",
        where=of(node).where,
        excerpt=excerpt(node),
        help=f'say what its dims mean: shardc.rule(torch.ops.{node.target}, "... -> ...")',
    )


def _by_data(node: Node) -> ShardingError:
    return ShardingError(
        f"{target_name(node.target)} decides a size or number by what tensors hold, so it needs them whole, "
        "and strict=True gathers nothing unasked",
        where=of(node).where,
        excerpt=excerpt(node),
        help="make what it is given whole there (a style's layouts, or shardc.constrain)",
    )
