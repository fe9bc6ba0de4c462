"""Tensors and their pieces: cut a global tensor as a spec says, join the pieces of all ranks again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from shardc.compiler.ir.collectives import Cut
from shardc.compiler.spec.mesh import Mesh, place
from shardc.compiler.spec.spec import Part, Spec, chunk

COMBINE = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "prod": torch.mul,
}


def combine(op: str, pieces: Sequence[Tensor]) -> Tensor:
    """The pieces of a pending value, reduced in rank order; bools reduce as any and all."""
    if pieces[0].dtype is torch.bool:
        logical = torch.logical_or if op in ("sum", "max") else torch.logical_and
        return reduce(logical, pieces)
    return reduce(COMBINE[op], pieces)


def cut(x: Tensor, spec: Spec, mesh: Mesh, coords: Mapping[str, int]) -> Tensor:
    """The piece of a global tensor that the rank at `coords` holds. A pending sum lies on the first rank whole,
    zero on the others; other pending values are the value itself on every rank."""
    pieces = x
    for d, dim in enumerate(spec.dims):
        if any(p.axes for p in dim):
            pieces = _narrow(pieces, d, dim, mesh, coords)
    for axis, op in spec.pending:
        if op == "sum" and coords[axis]:
            pieces = torch.zeros_like(pieces)
    return pieces


def _narrow(x: Tensor, d: int, dim: tuple[Part, ...], mesh: Mesh, coords: Mapping[str, int]) -> Tensor:
    if len(dim) == 1:
        start, length = chunk(dim[0].size, mesh, dim[0].axes, coords)
        return x.narrow(d, start, length)
    before, after = x.shape[:d], x.shape[d + 1 :]
    y = x.reshape(*before, *(p.size for p in dim), *after)
    for k, part in enumerate(dim):
        y = y.narrow(d + k, *chunk(part.size, mesh, part.axes, coords))
    return y.reshape(*before, math.prod(y.shape[d : d + len(dim)]), *after)


def join(pieces: Sequence[Tensor], spec: Spec, mesh: Mesh) -> Tensor:
    """The global tensor of which `pieces` holds each rank's part, in rank order. Copies of a piece that is
    whole over a mesh dim are taken from the first rank along it."""
    out = pieces[0].new_empty(spec.shape)
    done: dict[tuple, list[Tensor]] = {}
    split = spec.axes()
    pending = dict(spec.pending)
    for rank, piece in enumerate(pieces):
        coords = mesh.coords(rank)
        at = tuple(place(coords, a) for a in split)
        if mesh.rank(dict.fromkeys(mesh.names, 0) | _held(at, split, mesh) | {a: coords[a] for a in pending}) != rank:
            continue
        done.setdefault(at, []).append(piece)
    for at, summands in done.items():
        coords = {a: 0 for a in mesh.names} | dict(zip(split, at, strict=True))
        put(out, reduce_pending(summands, spec, mesh), spec, mesh, coords)
    return out


def _held(at: Sequence[int], split: Sequence[str], mesh: Mesh) -> dict[str, int]:
    """Where the first rank stands that is at these places along mesh dims, or parts of them."""
    return {mesh.dim_of(axis): i for axis, i in zip(split, at, strict=True)}


def reduce_pending(summands: Sequence[Tensor], spec: Spec, mesh: Mesh) -> Tensor:
    """Combine the pieces that differ only in the spec's pending mesh dims (rank order, last mesh dim fastest)."""
    values = list(summands)
    for axis, op in reversed(spec.pending):
        n = mesh[axis]
        values = [combine(op, values[i : i + n]) for i in range(0, len(values), n)]
    return values[0]


def put(out: Tensor, piece: Tensor, spec: Spec, mesh: Mesh, coords: Mapping[str, int]) -> None:
    """Write a rank's piece into its place in the global tensor."""
    shape = []
    sizes = [p.size for dim in spec.dims for p in dim]
    view = out.view(sizes)
    for k, part in enumerate(p for dim in spec.dims for p in dim):
        start, length = chunk(part.size, mesh, part.axes, coords)
        view = view.narrow(k, start, length)
        shape.append(length)
    view.copy_(piece.reshape(shape))


def deal(x: Tensor, cut: Cut) -> list[Tensor]:
    """A local tensor dealt into one piece per rank of a group."""
    view = x.reshape(cut.view)
    return [p for p in view.split_with_sizes(list(cut.sizes), cut.dim)]


def undeal(pieces: Sequence[Tensor], cut: Cut) -> Tensor:
    """The inverse of deal: pieces viewed as they were dealt, joined along the split part."""
    views = [p.reshape(cut.piece_view(i)) for i, p in enumerate(pieces)]
    return torch.cat(views, cut.dim)
