"""Where the sweep's layouts disagree, all are chosen together, to cost least.

    %a: f32[4, 32, 64] = shardc.sdpa(%q, ...)        causal attention on a GPU, split sequence: whole on every rank
    %mm: f32[128, 64] = aten.mm(%view, %w)           ... and so is what comes behind it
  ==>
    %a: f32[4@cp, 32, 64] = shardc.sdpa(%q, ...)     heads or rows of the batch are dealt to the ranks instead
    %mm: f32[(4 32@cp), 64] = aten.mm(%view, %w)     ... and then it goes on as it came

The sweep sees one call at a time, and no work. Left alone: programs in which every call takes its operands as they
come, and those in which the best choice would save less than a hundredth of what ranks repeat and move.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from shardc.compiler.infer.choose import choose
from shardc.compiler.infer.objective import Objective, total
from shardc.compiler.infer.strategies import Form, Strategies, Strategy
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import of, operands, spec
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

WORTH = 0.01  # of what ranks repeat and move


@dataclass(frozen=True)
class ChooseLayouts:
    name = "choose-layouts"
    takes = gives = Stage.SHARDED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        found: list[Strategies] = []

        def forms() -> Mapping[str, Form]:
            if not _disagrees(gm):
                return {}
            found.append(Strategies(gm, ctx.mesh, ctx.decisions, ctx.plan.data_axes))
            return {node.name: way.form for node, way in _better(found[0], ctx).items()}

        chosen = ctx.decisions.once("choose-layouts", forms)
        if not chosen:
            return PassResult()
        ways = (found or [Strategies(gm, ctx.mesh, ctx.decisions, ctx.plan.data_axes)])[0]
        ways.apply({n: next((w for w in of if w.form == chosen.get(n.name)), of[0]) for n, of in ways.of.items()})
        return PassResult(Counter(calls=sum(way.form != ways.of[n][0].form for n, way in ways.applied().items())))


def _better(found: Strategies, ctx: Context) -> Mapping[Node, Strategy]:
    """The layouts that cost less by enough, if there are some. They are laid out to be counted, and taken back."""
    objective = Objective(ctx.mesh, ctx.hardware)
    best = choose(found, objective)
    enough = WORTH * (best.before - objective.least(found)) if best.cost < best.before else math.inf
    if best.before - best.cost <= enough:
        return {}
    found.apply(best.picked)
    now = total(found, objective, found.applied())
    found.apply({node: ways[0] for node, ways in found.of.items()})
    return best.picked if best.before - now > enough else {}


def _disagrees(gm: GraphModule) -> bool:
    """Whether some call needs an operand in another layout than it has."""
    return any(
        spec(operand) != needed
        for node in call_nodes(gm)
        for operand, needed in zip(operands(node), of(node).wants or (), strict=False)
    )
