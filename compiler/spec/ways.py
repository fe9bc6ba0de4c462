"""The cheapest way from one layout to another."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from shardc.compiler.spec.cost import ROUNDS, price, wire_bytes
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec, axes_of, restrict


class Move(NamedTuple):
    """One collective or local move between two layouts."""

    kind: str
    args: tuple
    after: Spec


def local_elements(spec: Spec, mesh: Mesh) -> float:
    """Elements per rank, the mean over ranks: enough to compare ways."""
    return math.prod(spec.shape) / math.prod(mesh[a] for a in spec.axes())


@cache
def ways(source: Spec, target: Spec, itemsize: int, mesh: Mesh) -> tuple[Move, ...]:
    """The cheapest sequence of moves from one layout to another (Dijkstra over layouts)."""
    tie = itertools.count()
    queue: list = [(0.0, next(tie), source, ())]
    seen: set[Spec] = set()
    while queue:
        cost, _, at, path = heapq.heappop(queue)
        if at == target:
            return path
        if at in seen:
            continue
        seen.add(at)
        for move in _moves(at, target, mesh):
            if move.after not in seen:
                further = cost + _price(move, at, itemsize, mesh)
                heapq.heappush(queue, (further, next(tie), move.after, (*path, move)))
    raise AssertionError(f"no way from {source} to {target}")


def sent_on_way(source: Spec, target: Spec, itemsize: int, mesh: Mesh) -> Iterator[tuple[Move, float]]:
    """The moves of the cheapest way, with the bytes that a rank sends in each; none within a rank."""
    at = source
    for move in ways(source, target, itemsize, mesh):
        pieces, n = _pieces(move, at, itemsize, mesh)
        yield move, wire_bytes(move.kind, pieces, n) if move.kind in ROUNDS else 0.0
        at = move.after


def _price(move: Move, at: Spec, itemsize: int, mesh: Mesh) -> float:
    return price(move.kind, *_pieces(move, at, itemsize, mesh))


def _pieces(move: Move, at: Spec, itemsize: int, mesh: Mesh) -> tuple[float, int]:
    """Bytes of all equal pieces of what a move takes, as `wire_bytes` counts them, and over how many ranks."""
    n = mesh[next(a for a in move.args if isinstance(a, str))]
    local = local_elements(at, mesh) * itemsize
    return (n * local if move.kind == "all_gather" else local), n


def _moves(at: Spec, target: Spec, mesh: Mesh) -> Iterator[Move]:
    for axis in dict.fromkeys((*mesh.names, *at.axes(), *target.axes())):  # parts of mesh dims too
        op, to = at.reduction(axis), target.dim_of(axis)
        source = at.dim_of(axis)
        if op and target.reduction(axis) != op:
            bare = at.without(axis, mesh)
            yield Move("all_reduce", (axis, op), bare)
            if to is not None and (after := _joined(bare, target, to, axis, mesh)) is not None:
                yield Move("reduce_scatter", (to, axis, op), after)
        elif source is not None and _innermost(at, source, axis) and at.dims[source] != target.dims[source]:
            bare = at.without(axis, mesh)
            yield Move("all_gather", (source, axis), bare)
            if to is not None and to != source and (after := _joined(bare, target, to, axis, mesh)) is not None:
                yield Move("all_to_all", (source, to, axis), after)
        elif source is None and op is None:
            if to is not None and (after := _joined(at, target, to, axis, mesh)) is not None:
                yield Move("local_slice", (to, axis), after)
            if target.reduction(axis) == "sum":
                pending = {**dict(at.pending), axis: "sum"}
                yield Move("make_partial", (axis,), at.with_pending(pending, mesh))


def _innermost(at: Spec, dim: int, axis: str) -> bool:
    return any(part.axes and part.axes[-1] == axis for part in at.dims[dim])


def _joined(at: Spec, target: Spec, dim: int, axis: str, mesh: Mesh) -> Spec | None:
    """`at` with the axis splitting `dim` as in the target, if it would be the innermost of its part there."""
    mine = axes_of(at.dims[dim])
    wanted = restrict(target.dims[dim], (*mine, axis), mesh)
    if restrict(wanted, mine, mesh) != at.dims[dim]:
        return None
    after = at.with_dim(dim, wanted)
    return after if _innermost(after, dim, axis) else None
