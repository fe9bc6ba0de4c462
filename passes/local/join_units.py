"""The gathers of one unit become one, and so do the reduce_scatters of its gradients.

    %all_gather: f32[16, 8] = shardc.all_gather(%w, 0, dp)
    ...
    %all_gather_1: f32[16] = shardc.all_gather(%b, 0, dp)
  ==>
    %all_gather_2: (f32[16, 8], f32[16]) = shardc.all_gather([%w, %b], [0, 0], dp)
    %getitem: f32[16, 8] = getitem(%all_gather_2, 0)
    %getitem_1: f32[16] = getitem(%all_gather_2, 1)

A gather stands where the first of its values is needed; a reduce_scatter where the last of its gradients is ready,
cast to the plan's `reduce_dtype` for the way. Left alone: collectives that serve no unit, those of other mesh dims,
dtypes or halves, a gather of what is computed, gradients of which one is made from another, and one rank.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import all_gather, reduce_scatter
from shardc.compiler.ir.graph import call_nodes, output_node, placeholders
from shardc.compiler.ir.node import INHERITED, spec, tensors
from shardc.compiler.ir.rewrite import cast
from shardc.compiler.ir.views import is_kept
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class JoinUnits:
    name = "join-units"
    takes = gives = Stage.LOCAL
    exact = False  # gradients may travel in another dtype

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for members in _groups(gm, all_gather, ctx):
            _gather_at_once(members)
            changes["all_gather"] += 1
        for members in _groups(gm, reduce_scatter, ctx):
            if not _depend(members):
                _scatter_at_once(members, ctx)
                changes["reduce_scatter"] += 1
        return PassResult(changes)


def _groups(gm: GraphModule, kind: Any, ctx: Context) -> list[list[Node]]:
    """Collectives of a kind that may move together, in graph order; two of them at least."""
    found: dict[Any, list[Node]] = {}
    for node in call_nodes(gm, kind):
        value, _, axis, *rest = node.args
        if node.meta.get("unit") is None or ctx.mesh[str(axis)] == 1 or not isinstance(value, Node):
            continue
        if kind is all_gather and not _is_given(value):
            continue
        like = tensors(value)[0]
        where = (node.meta.get(key) for key in ("unit", "phase", "region"))
        found.setdefault((axis, *rest, like.dtype, like.device, *where), []).append(node)
    return [members for members in found.values() if len(members) > 1]


def _is_given(node: Node) -> bool:
    """Whether a value is there before anything of its half is computed: an input, a cast of one, or what was kept."""
    if node.target is aten._to_copy.default:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or is_kept(node)


def _gather_at_once(members: Sequence[Node]) -> None:
    first, values = members[0], [node.all_input_nodes[0] for node in members]
    for value in values:
        if value > first:
            first.prepend(value)
    with first.graph.inserting_before(first):
        _take_apart(_joint(members, values), members)


def _depend(members: Sequence[Node]) -> bool:
    """Whether what is made of one is needed for another."""
    behind = _made_of(members)
    return any(node in behind for node in members)


def _made_of(members: Sequence[Node]) -> dict[Node, None]:
    """All that is made of these, in no order."""
    found: dict[Node, None] = {}
    stack = [user for node in members for user in node.users]
    while stack:
        node = stack.pop()
        if node.op != "output" and node not in found:
            found[node] = None
            stack += node.users
    return found


def _scatter_at_once(members: Sequence[Node], ctx: Context) -> None:
    gm = members[0].graph.owning_module
    assert gm is not None
    values = [node.all_input_nodes[0] for node in members]
    last, given = max(values), placeholders(gm)
    end, made = output_node(gm), sorted(_made_of(members))
    for node in made:  # whatever is made of a gradient can wait
        end.prepend(node)
    wire = ctx.plan.wire_dtype(members[0].args[1:], tensors(values[0])[0].dtype)
    with gm.graph.inserting_before((given[-1] if last in given else last).next):
        values = [cast(value, wire) for value in values]
        joint = _joint(members, values)
    with gm.graph.inserting_before(made[0] if made else end):
        _take_apart(joint, members)


def _joint(members: Sequence[Node], values: Sequence[Node]) -> Node:
    """The collective that moves all the values, in the dtype that they have."""
    first = members[0]
    args = (list(values), [node.args[1] for node in members], *first.args[2:])
    joint = first.graph.call_function(first.target, args)  # pyright: ignore[reportArgumentType]
    whys = dict.fromkeys(node.meta["why"] for node in members if node.meta.get("why"))
    joint.meta = {k: first.meta[k] for k in INHERITED if k in first.meta} | {
        "val": tuple(tensors(n)[0].to(tensors(v)[0].dtype) for n, v in zip(members, values, strict=True)),
        "spec": tuple(spec(node) for node in members),
        "path": first.meta["unit"].split(" ")[0],
        "why": "; ".join(list(whys)[:3]) + (f" and {len(whys) - 3} more" if len(whys) > 3 else ""),
    }
    return joint


def _take_apart(joint: Node, members: Sequence[Node]) -> None:
    """Each value in its collective's place, in the dtype that it had."""
    for i, node in enumerate(members):
        part = joint.graph.call_function(operator.getitem, (joint, i))
        own = tensors(node)[0]
        part.meta = {**node.meta, "val": joint.meta["val"][i], "origin": node.name}
        part.meta.pop("made_by", None)
        if part.meta["val"].dtype is not own.dtype:
            part.meta["wire"] = part.meta["val"].dtype
        node.replace_all_uses_with(cast(part, own.dtype))  # and the runner erases what nothing uses
