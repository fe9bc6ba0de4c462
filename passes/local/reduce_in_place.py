"""An all_reduce whose operand nothing needs any more leaves the sum where the operand lay.

    %mm: f32[8, 16]+dp = aten.mm(%t, %tangent)
    %start_all_reduce: f32[8, 16] = shardc.start(%mm, all_reduce, dp)
  ==>
    %start_all_reduce: f32[8, 16] = shardc.start(%mm, all_reduce, dp, reuse=True)

It spares a copy of the operand, in time and in memory. Left alone: several values, whose message is memory of its own
already; operands that are inputs, or results of anything but an operator or collective that makes memory of its own,
or views of such; those that are used afterwards, in backward or by the caller, themselves or as another view of the
same memory; what backward computes again; a mesh dim of one rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import COLLECTIVES, all_reduce, start, wait
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import arguments, of
from shardc.compiler.ir.views import shows
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import computes
from shardc.compiler.spec.mesh import Mesh


@dataclass(frozen=True)
class ReduceInPlace:
    name = "reduce-in-place"
    takes = gives = Stage.SCHEDULED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        for node in call_nodes(gm):
            move = move_of(node)
            if move is None or move.target is not all_reduce or ctx.mesh[move.axis] == 1:
                continue
            if not isinstance(move.args[0], Node) or of(node).region:
                continue
            if _is_dead_after(move.args[0], node, order, ctx.mesh):
                node.kwargs = {**node.kwargs, "reuse": True}
                changes["reused"] += 1
        return PassResult(changes)


def _is_dead_after(value: Node, reduction: Node, order: dict[Node, int], mesh: Mesh) -> bool:
    """Whether no node behind the reduction sees the memory that a value lies in."""
    source = value
    while shows(source):
        source = arguments(source)[0]
    if not (_makes(source) or _arrives(source, mesh)):
        return False
    seen, stack = {source}, [source]
    while stack:
        node = stack.pop()
        if of(node).region:
            return False
        for user in node.users:
            if user is reduction or user in seen:
                continue
            if order[user] > order[reduction] or of(user).region:  # which backward does once more
                return False
            if shows(user):
                seen.add(user)
                stack.append(user)
            elif not _makes(user):
                return False
    return True


def _makes(node: Node) -> bool:
    """Whether a result is memory of its own."""
    return computes(node.target)


def _arrives(node: Node, mesh: Mesh) -> bool:
    """Whether a value is what a collective gave: memory of its own but over one rank, where it is the operand."""
    move = move_of(arguments(node)[0] if node.target is wait else node)
    return move is not None and move.target in COLLECTIVES and node.target is not start and mesh[move.axis] > 1
