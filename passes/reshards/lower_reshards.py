"""Each reshard becomes the cheapest sequence of collectives and local moves between its two layouts.

  %reshard: f32[8, 16@tp] = shardc.reshard(%mm, [8, 16@tp])          %mm is [8, 16]+tp
==>
  %reduce_scatter: f32[8, 16@tp] = shardc.reduce_scatter(%mm, 1, tp)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.fx import GraphModule

from shardc.compiler.ir import collectives
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, of, spec, tensors
from shardc.compiler.ir.rewrite import emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.ways import ways


@dataclass(frozen=True)
class LowerReshards:
    name = "lower-reshards"
    takes = gives = Stage.RESHARDED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm, reshard):
            value, target = arguments(node)
            itemsize = tensors(value)[0].element_size()
            with gm.graph.inserting_before(node):
                for move in ways(spec(value), target, itemsize, ctx.mesh):
                    op = getattr(collectives, move.kind)
                    args = tuple(a for a in move.args if a != "sum")  # the usual reduction goes unsaid
                    value = emit(op, (value, *args), node, layout=move.after, why=of(node).why)
                    changes[move.kind] += 1
            replace(node, value)
        return PassResult(changes)
