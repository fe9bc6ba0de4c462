"""What a mark makes of the layout that comes to it: the wishes at a module's border, or at a constraint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.marks import GRAD, MARK, UnlessPending
from shardc.compiler.ir.node import arguments, of, spec
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import REPLICATE, Spec


def forward_marks(gm: GraphModule) -> Mapping[Node, Node]:
    """The mark in forward that each mark in backward is the gradient of. Calls of one module are met last first."""
    calls, out = defaultdict[str, list[Node]](list), {}
    for node in call_nodes(gm, MARK):
        key: str = arguments(node)[1]
        if not key.endswith(GRAD):
            if not of(node).data:
                calls[key].append(node)
        elif met := calls[key.removesuffix(GRAD)]:
            out[node] = met.pop() if len(met) > 1 else met[0]
    return out


def behind_mark(node: Node, layout: Spec, partner: Node | None, mesh: Mesh) -> Spec:
    """Forward takes the layout wished for, backward that of what it came from. partner: a gradient's mark in forward,
    which is laid out already."""
    if of(node).data:
        return layout  # whole, whatever is wished of it
    if arguments(node)[1].endswith(GRAD):
        return _transposed(layout, partner, mesh) if partner is not None else layout
    wishes = sorted(of(node).wish, key=lambda wish: wish[1] != REPLICATE)
    for axis, wished, open_split, _ in wishes:  # what is to be whole is out of the others' way
        gradient = isinstance(wished, UnlessPending)
        layout = wished.of(layout, mesh) if gradient else layout.place(axis, wished, mesh, open_split)
    return layout


def _transposed(gradient: Spec, mark: Node, mesh: Mesh) -> Spec:
    """The gradient of a layout change: split as the value was before it, whole where that was whole or pending.

    A gradient still pending where a value entered a module stays so: it can be summed with its siblings first.
    """
    x, key = arguments(mark)
    before, after, entering = spec(x), spec(mark), "|in|" in key
    for axis, *_ in of(mark).wish:
        if before.dim_of(axis) == after.dim_of(axis) and before.reduction(axis) == after.reduction(axis):
            continue
        if gradient.reduction(axis) and entering:
            continue
        gradient = gradient.without(axis, mesh)
        at = before.dim_of(axis)
        if at is not None:
            gradient = gradient.like(before, at, axis, mesh)
    return gradient
