"""Equal calls on equal operands are one value; so one gather serves every use of it.

    %g1: f32[8, 16] = shardc.all_gather(%x, 0, tp)
    %g2: f32[8, 16] = shardc.all_gather(%x, 0, tp)         used by %mm
  ==>
    %g1: f32[8, 16] = shardc.all_gather(%x, 0, tp)         used by %mm

Left alone: random draws (two draws are two values), a gather of a parameter that backward repeats on
purpose (meta `regather`), and values that are recomputed in backward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import is_random, of, specs
from shardc.compiler.ir.rewrite import replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage


@dataclass(frozen=True)
class MergeEqual:
    name = "merge-equal"
    takes = gives = Stage.RESHARDED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        known: dict[Any, Node] = {}
        for node in call_nodes(gm):
            if is_random(node):
                continue
            key = _key(node)
            twin = known.setdefault(key, node)
            if twin is not node:
                replace(node, twin)
                changes["merged"] += 1
        return PassResult(changes)


def _key(node: Node) -> Any:
    view = of(node)
    phase = view.phase if view.regather or view.region else None
    return node.target, _frozen(node.args), _frozen(node.kwargs), specs(node), view.by_origin, phase


def _frozen(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple(_frozen(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(tree.items()))
    return type(tree).__name__, tree
