"""What must hold of a graph at each stage; a pass that breaks it is named at once.

TRACED      every call has a value, a phase and a place in the source; no layouts yet
SHARDED     every value has a layout of its own shape; every operator call has the layouts it needs
RESHARDED   every operand arrives in exactly the layout needed, and the operator gives exactly the layout
            recorded; a collective changes the layout as its name says
LOCAL       as RESHARDED for what still has a layout; sizes in arguments are the rank's own
SCHEDULED   as LOCAL; the order is final
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from enum import IntEnum

from torch.fx import GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.moves import Call, move_of
from shardc.compiler.ir.node import of, operands, spec, specs, tensors, val
from shardc.compiler.ir.text import excerpt
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import Number, named_shape, of_data
from shardc.compiler.spec.spec import Spec, axes_of


class Stage(IntEnum):
    """How far a graph has come."""

    TRACED = 0
    SHARDED = 1
    RESHARDED = 2
    LOCAL = 3
    SCHEDULED = 4


def verify(gm: GraphModule, stage: Stage, mesh: Mesh, changed: Sequence[Node] | None = None) -> None:
    """Check a graph's invariants. Raises ShardingError naming the first node that breaks one. changed: the only nodes
    that are not as they were when the graph was last found to keep the invariants of this stage; None: any may be."""
    gm.graph.lint()
    at_risk = None if changed is None else _around(changed)
    for node in gm.graph.nodes:
        if node.op == "output" or (at_risk is not None and node not in at_risk):
            continue
        if stage < Stage.LOCAL and val(node) is None:
            raise _broken(node, "has no value")
        if _meets_data(node) and not of(node).data:
            raise _broken(node, "is made of what data decides the size of, and does not say so")
        if stage >= Stage.SHARDED:
            _check_layouts(node, stage)
        if stage >= Stage.RESHARDED and node.op == "call_function":
            _check_call(node, stage, mesh)


def _around(changed: Sequence[Node]) -> set[Node]:
    """Nodes, and those whose invariants speak of them: their users, and what they use."""
    return {near for node in changed for near in (node, *node.users, *node.all_input_nodes)}


def _check_layouts(node: Node, stage: Stage) -> None:
    layouts = specs(node)
    if stage >= Stage.LOCAL and not layouts:
        return  # a step inside one operator's local form
    values = tensors(node)
    if len(layouts) != len(values):
        raise _broken(node, f"has {len(values)} values and {len(layouts)} layouts")
    for layout, value in zip(layouts, values, strict=True):
        if layout.shape != named_shape(value):
            raise _broken(node, f"has shape {named_shape(value)} and layout {layout}")
        if layout.of_data and not layout.is_whole:
            raise _broken(node, f"has a size that data decides, and is not whole: {layout}")
        used = [*layout.axes(), *(a for a, _ in layout.pending)]
        if len(used) != len(set(used)):
            raise _broken(node, f"uses a mesh dim twice: {layout}")


def _meets_data(node: Node) -> bool:
    """Whether a call's sizes or numbers are known only when the program runs."""
    values = (node, *node.all_input_nodes) if node.op == "call_function" else ()
    return any(isinstance(val(n), Number) or any(of_data(named_shape(t)) for t in tensors(n)) for n in values)


def _check_call(node: Node, stage: Stage, mesh: Mesh) -> None:
    move = move_of(node)
    if move is not None:
        for part in move.each():
            if specs(part.args[0]) and part.layouts:
                _check_collective(node, part, mesh)
        if node.target is c.start and any(user.target is not c.wait for user in node.users):
            raise _broken(node, "is used before it is waited for")
    elif node.target is c.wait:
        if getattr(node.args[0], "target", None) is not c.start:
            raise _broken(node, "waits for what was not started")
    elif node.target is not operator.getitem and stage == Stage.RESHARDED and (wants := of(node).wants):
        for i, (needed, operand) in enumerate(zip(wants, operands(node), strict=True)):
            if spec(operand) != needed:
                raise _broken(node, f"needs operand {i} as {needed}, but %{operand.name} is {spec(operand)}")


def _check_collective(node: Node, move: Call, mesh: Mesh) -> None:
    axis, before, after = move.axis, move.before, move.after
    if isinstance(move.args[0], Node) and of(move.args[0]).by_origin:
        raise _broken(node, "moves rows whose order is each rank's own")
    if move.target is c.fetch:
        if before.dim_of(axis) != move.args[1] or after.dim_of(axis) not in (move.args[1], None):
            raise _broken(node, f"cannot turn {before} into {after}")
        return
    was, now = _state(before, axis), _state(after, axis)
    reduced = before.reduction(axis) == (*move.args[move.args.index(axis) + 1 :], "sum")[0]
    legal = {
        c.all_gather: was == "split" and now == "whole",
        c.all_reduce: reduced and now == "whole",
        c.reduce_scatter: reduced and now == "split",
        c.all_to_all: was == "split" and now == "split" and before.dim_of(axis) != after.dim_of(axis),
        c.local_slice: was == "whole" and now == "split",
        c.make_partial: was == "whole" and now == "pending",
    }
    split = [layout for layout in (before, after) if layout.dim_of(axis) is not None]
    named = [layout.dim_of(axis) for layout in split] == [a for a in move.args[1:] if isinstance(a, int)]
    inner = all(_innermost(layout, axis) for layout in split)
    if not (legal[move.target] and named and inner) or before.without(axis, mesh) != after.without(axis, mesh):
        raise _broken(node, f"cannot turn {before} into {after}")


def _innermost(layout: Spec, axis: str) -> bool:
    """Whether no other mesh dim splits what this one splits: pieces of pieces cannot be moved first."""
    return all(part.axes[-1] == axis for dim in layout.dims for part in dim if axis in part.axes)


def _state(layout: Spec, axis: str) -> str:
    if layout.reduction(axis):
        return "pending"
    return "split" if any(axis in axes_of(dim) for dim in layout.dims) else "whole"


def _broken(node: Node, what: str) -> ShardingError:
    return ShardingError(
        f"%{node.name} {what}",
        where=of(node).where,
        excerpt=excerpt(node),
        help="this is a fault of the compiler, or of an edited program: a value would be wrong",
    )
