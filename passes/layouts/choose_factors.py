"""An open split takes the factor that survives the views behind it.

    %w: f32[48@tp, 64] = param wq.weight             tp=2, a style: rows are split, which factor is open
    %view: f32[8, 5, 3, 16] = aten.view(%q, ...)     three heads of 16
  ==>
    %reshard: f32[(3@tp 16), 64] = shardc.reshard(%w, ...)

so that heads stay whole on their ranks and nothing is gathered at the view. Left alone: layouts the user
closed with a placement, and splits that already lie between heads (4 heads on 2 ranks).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from shardc.compiler.infer.open_splits import refinements
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import inputs_of
from shardc.compiler.ir.node import set_spec, spec
from shardc.compiler.ir.rewrite import emit, redirect
from shardc.compiler.ir.signature import InputKind
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.spec import Spec


@dataclass(frozen=True)
class ChooseFactors:
    name = "choose-factors"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        better = refinements(gm, ctx.signature, ctx.plan, ctx.mesh, ctx.decisions)
        for entry, node in inputs_of(gm, ctx.signature, InputKind.PARAMETER):
            if entry.name in better:
                changes["refined"] += _compute_with(node, better[entry.name])
        return PassResult(changes)


def _compute_with(param: Node, layout: Spec) -> int:
    """Let every use of a parameter see this layout: its gathers change their target, or it gets a reshard."""
    gathers = [u for u in param.users if u.target is reshard]
    for gather in gathers:
        gather.args = (param, layout)  # pyright: ignore[reportAttributeAccessIssue]
        set_spec(gather, layout)
    if gathers or spec(param) == layout:
        return len(gathers)
    users = [u for u in param.users if u.op != "output"]
    if not users:
        return 0
    with param.graph.inserting_before(min(users)):
        new = emit(reshard, (param, layout), param, layout=layout, why="whole heads, not pieces of them")
    redirect(users, param, new)
    return 1
