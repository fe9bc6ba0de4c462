"""What a half returns to its caller has memory of its own, so that changing it in place changes nothing else.

    return (%mm, %view_of_mm, %x)     ==>     return (%mm, own(%view_of_mm, %mm), own(%x, %x))

Two equal gradients are one value in a program, an output may show an input, what backward will need may lie in a
buffer that forward changes: each of these is copied, as the last step. Which values might share memory is told by
their operators, whether they do is seen when they are there. Left alone: what forward saves and also returns;
autograd tells whoever changes that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.moves import move_of, piece_of
from shardc.compiler.ir.node import arguments, tensors
from shardc.compiler.ir.views import shows
from shardc.compiler.rules.facts import is_thin


def own(x: Tensor, *others: Tensor) -> Tensor:
    """x, or a copy where it lies in memory of these others, or several of its elements lie in one place."""
    if any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
        return x.contiguous()
    return x.clone() if any(_meets(x, other) for other in others) else x


def _meets(x: Tensor, other: Tensor) -> bool:
    if x.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    (a, b), (p, q) = _stretch(x), _stretch(other)
    return a < q and p < b


def _stretch(x: Tensor) -> tuple[int, int]:
    """From and to which byte of its storage a tensor lies."""
    if not x.numel():
        return 0, 0
    start, last = x.storage_offset(), sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return int(start * x.element_size()), int((start + last + 1) * x.element_size())


def apart(gm: GraphModule, kept: int | None = None, changed: Collection[int] = ()) -> dict[int, list[Node]]:
    """Of the values that a half returns, by position, those to be made `own`, and from what.

    kept: so many, the first, are the caller's to keep; None: all. changed: inputs that are overwritten once the half
    has run; no other value may lie there.
    """
    inputs, ends, homes = placeholders(gm), returned(gm), Homes()
    kept = len(ends) if kept is None else kept
    taken: dict[Node, list[Node]] = {}
    found: dict[int, list[Node]] = {}
    largest = sorted(range(kept), key=lambda i: -_numel(ends[i]))  # of what shares memory the largest stays
    for i in [*largest, *range(kept, len(ends))]:
        node = ends[i]
        if not isinstance(node, Node):
            continue
        places = homes.of(node)
        others = [n for j, n in enumerate(inputs) if n in places and (i < kept or j in changed)]
        if i < kept:
            others += dict.fromkeys(value for place in places for value in taken.get(place, ()))
            for place in places:
                taken.setdefault(place, []).append(node)
        if others or (i < kept and homes.thin(node)):
            found[i] = others
    return found


def read_later(gm: GraphModule, first: int) -> set[int]:
    """The inputs, by position, in whose memory may lie what a half returns from position `first` on."""
    homes = Homes()
    found = {home for node in returned(gm)[first:] for home in homes.of(node)}
    return {i for i, node in enumerate(placeholders(gm)) if node in found}


def _numel(node: Node | None) -> int:
    return 0 if node is None else sum(t.numel() for t in tensors(node))


class Homes:
    """In whose memory a value may lie: its own, an input's, or that of a value which it may be a view of."""

    def __init__(self) -> None:
        self._known: dict[Node, frozenset[Node]] = {}

    def of(self, node: Node) -> frozenset[Node]:
        if node not in self._known:
            self._known[node] = frozenset([node]).union(*map(self.of, _shown(node)))
        return self._known[node]

    def thin(self, node: Node) -> bool:
        return any(is_thin(n.target) for n in self.of(node))


def _shown(node: Node) -> Sequence[Node]:
    """The operands in whose memory a result may lie. Over one rank a value that moved is its operand."""
    if (piece := piece_of(node)) is not None:
        return [piece]
    if node.target is c.wait or move_of(node) is not None:
        return node.all_input_nodes
    return arguments(node)[:1] if shows(node) else ()
