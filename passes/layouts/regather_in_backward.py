"""A gathered parameter that is freed after forward is gathered again for backward.

    %g: f32[16, 8] = shardc.reshard(%w, [16, 8])           %w is [16@dp, 8]
    %t: f32[8, 16] = aten.t(%g)
    %mm: f32[4, 16] = aten.mm(%x, %t)
    %gx: f32[4, 8] = aten.mm(%grad, %g)                    backward
  ==>
    %g: f32[16, 8] = shardc.reshard(%w, [16, 8])
    ...
    %g_1: f32[16, 8] = shardc.reshard(%w, [16, 8])         backward
    %gx: f32[4, 8] = aten.mm(%grad, %g_1)

Where parameters stay split over some ranks (`reshard_after_forward=4`), forward keeps that much of what it gathered,
and backward gathers that:

    %k: f32[16@dp/4, 8] = shardc.reshard(%g, [16@dp/4, 8])
    ...
    %g_1: f32[16, 8] = shardc.reshard(%k, [16, 8])         backward

Views and casts of the parameter that backward uses are made again from the second gather, else they would keep
the first alive. Where backward computes a region again, the gather for it belongs to the region. Left alone:
gathers that are kept (`reshard_after_forward=False`), those that backward, or forward, does not use, and of the root
what lies between the other units' forward and backward, such as the head: freed at the end of one half it would be
gathered at the start of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, of
from shardc.compiler.ir.rewrite import emit, redirect
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import is_cheap
from shardc.compiler.spec.spec import Spec


@dataclass(frozen=True)
class RegatherInBackward:
    name = "regather-in-backward"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes, notes = Counter(), {}
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        gathers = call_nodes(gm, reshard)
        units = _turn([u for g in gathers if of(g).unit for u in _uses(g)], order)
        for gather in gathers:
            view, region = of(gather), _region(gather)
            kept, view.kept = view.kept, None  # what comes of the gather itself is not kept
            if view.regather and region:
                view.region = region
                if kept is not None:
                    notes[f"{region}: computed again in backward, so gathered again over all ranks"] = None
                changes["gathers"] += 1
            elif view.regather and kept is None and _lies_within(gather, units, order):
                changes["kept"] += 1
            elif view.regather:
                changes["gathers"] += _gathered_again(gather, kept)
        return PassResult(changes, tuple(notes))


def _region(gather: Node) -> str:
    """The region that backward computes again, if all uses in forward lie in it: the gather is made again with it."""
    early = [u for u in gather.users if u.op != "output" and of(u).phase != "backward"]
    regions = {of(u).region or "" for u in early}
    return regions.pop() if len(regions) == 1 else ""


def _lies_within(gather: Node, units: tuple[int, int], order: dict[Node, int]) -> bool:
    """Whether a parameter of the root is used last in forward and first in backward, no other unit's in between."""
    last, first = _turn(_uses(gather), order)
    return of(gather).unit == "" and -1 < units[0] < last and first < units[1]


def _turn(uses: Sequence[Node], order: dict[Node, int]) -> tuple[int, int]:
    """The place of the last use in forward, -1 where there is none, and of the first in backward."""
    early = [order[u] for u in uses if of(u).phase != "backward"]
    late = [order[u] for u in uses if of(u).phase == "backward"]
    return max(early, default=-1), min(late, default=len(order))


def _uses(node: Node) -> list[Node]:
    """What computes with a value, through cheap calls."""
    users = [u for u in node.users if u.op != "output"]
    return [use for u in users for use in (_uses(u) if is_cheap(u.target) else [u])]


def _gathered_again(gather: Node, kept: Spec | None) -> bool:
    """A second gather for backward, of what forward keeps of the first; without that, of what is stored."""
    twin = _again(gather)
    if twin is not None and kept is not None:
        _, compute = arguments(gather)
        with gather.graph.inserting_after(gather):
            piece = emit(reshard, (gather, kept), gather, kept=True)
        twin.args = (piece, compute)
    return twin is not None


def _again(node: Node) -> Node | None:
    """A second `node` for its uses in backward, through cheap calls; None where it has none, or only such."""
    late = [u for u in node.users if u.op != "output" and of(u).phase == "backward"]
    through = [u for u in node.users if u not in late and is_cheap(u.target)]
    copies = [(u, copy) for u in through if (copy := _again(u)) is not None]
    if not late and not copies:
        return None
    if len(late) == len(node.users):
        of(node).phase = "backward"
        return None
    users = [*late, *(copy for _, copy in copies)]
    with node.graph.inserting_before(min(users)):
        twin = node.graph.node_copy(node, lambda n: n)
    of(twin).phase = "backward"
    redirect(users, node, twin)
    return twin
