"""Symbolic collectives: identities on the global value, of which only the layout changes.

They name mesh dims, never groups, so a graph that holds them still runs on one device and equals the
original module. What moves on the wire is in the layouts of a node and its operand; `Cut` says which
pieces those are, for whoever performs the collective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec, chunk

Value = Any  # a tensor, or several that move together
Runs = Sequence[tuple[int, int, int]]  # (start, stop, step) of each, as `range` has them


def reshard(x: Tensor, spec: Spec) -> Tensor:
    """Any change of layout, not yet lowered."""
    return x


def all_gather(x: Value, dim: int | Sequence[int], axis: str) -> Value:
    """[n@axis] -> [n]; of several values, each with its own dim, in one go"""
    return x


def reduce_scatter(x: Value, dim: int | Sequence[int], axis: str, op: str = "sum") -> Value:
    """[n]+axis -> [n@axis]; of several values, each with its own dim, in one go"""
    return x


def all_reduce(x: Value, axis: str, op: str = "sum", *, reuse: bool = False) -> Value:
    """[n]+axis -> [n]; of several values in one go. reuse: nothing needs the operand any more, and the result may lie
    in its memory"""
    return x


def all_to_all(x: Tensor, source: int, dim: int, axis: str) -> Tensor:
    """[n@axis, m] -> [n, m@axis]"""
    return x


def fetch(
    x: Tensor, dim: int, axis: str, held: Sequence[int], wanted: Sequence[Runs], fill: float | None = None
) -> Tensor:
    """Inside one operator's local form: each rank gets the indices of a split dim that it wants, in its order, from
    whichever ranks hold them; `fill` for those that there are not. held: how many each rank along the axis has, in
    order. Locally, [5] -> [what rank 0 wants]."""
    return x.narrow(dim, 0, 0).new_empty([*x.shape[:dim], len(indices_of(wanted[0])), *x.shape[dim + 1 :]])


def indices_of(runs: Runs) -> list[int]:
    """The global indices that runs name, one after another."""
    return [i for run in runs for i in range(*run)]


def local_slice(x: Tensor, dim: int, axis: str) -> Tensor:
    """[n] -> [n@axis]; nothing moves"""
    return x


def make_partial(x: Tensor, axis: str) -> Tensor:
    """[n] -> [n]+axis: the first rank keeps the value, the others hold zeros; nothing moves"""
    return x


def start(x: Value, kind: str, *args: Any, reuse: bool = False) -> Value:
    """`start(x, "all_reduce", "tp")`: a collective under way. Nothing but `wait` may take what this gives."""
    return x


def wait(started: Value) -> Value:
    """The result of what `start` began, when it is there."""
    return started


COLLECTIVES = (all_gather, reduce_scatter, all_reduce, all_to_all, fetch)
LOCAL_MOVES = (local_slice, make_partial)
NAMED = {move.__name__: move for move in COLLECTIVES}
SYMBOLIC = frozenset((reshard, *COLLECTIVES, *LOCAL_MOVES, start, wait))


@dataclass(frozen=True)
class Cut:
    """How one mesh dim deals a local tensor into pieces, on the rank at some coordinates.

    view: the local tensor's shape with the split part as a dim of its own, before the mesh dim splits it;
    dim: which of those dims; sizes: the length of each rank's piece, in order of its coordinate;
    flat: the shape after the pieces are joined; cut: the shape of this rank's own piece.
    """

    view: tuple[int, ...]
    dim: int
    sizes: tuple[int, ...]

    def piece_view(self, i: int) -> tuple[int, ...]:
        return (*self.view[: self.dim], self.sizes[i], *self.view[self.dim + 1 :])

    @property
    def numels(self) -> list[int]:
        """Elements of each rank's piece."""
        return [math.prod(self.piece_view(i)) for i in range(len(self.sizes))]

    @property
    def leading(self) -> bool:
        """Whether the whole is its pieces one after another."""
        return math.prod(self.view[: self.dim]) == 1

    @property
    def gapless(self) -> bool:
        """Whether only trailing ranks hold less than the longest piece: then rows of that length hold the whole."""
        longest = max(self.sizes)
        filled = sum(self.sizes) // longest if longest else 0
        return set(self.sizes[:filled]) <= {longest}


def cut_of(split: Spec, dim: int, axis: str, mesh: Mesh, coords: Mapping[str, int], others: Spec) -> Cut:
    """The pieces of dim `dim` over `axis`: `split` is the layout where the axis splits that dim (as the last of
    its part's mesh dims), `others` the layout that says the local sizes of the remaining dims."""
    view: list[int] = []
    at, sizes = 0, ()
    for d, parts in enumerate(split.dims):
        if d != dim:
            view.append(math.prod(chunk(p.size, mesh, p.axes, coords)[1] for p in others.dims[d]))
            continue
        for part in parts:
            if axis not in part.axes:
                view.append(chunk(part.size, mesh, part.axes, coords)[1])
                continue
            at = len(view)
            view.append(chunk(part.size, mesh, part.axes[:-1], coords)[1])
            sizes = tuple(chunk(part.size, mesh, part.axes, {**coords, axis: i})[1] for i in range(mesh[axis]))
    return Cut(tuple(view), at, sizes)
