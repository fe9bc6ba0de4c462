"""Cuts a tensor into the pieces its layout gives each rank, and joins them, all by lists of indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Dim, Spec, axes_of

COMBINE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum, "prod": torch.mul}


def indices(dim: Dim, mesh: Mesh, coords: Mapping[str, int]) -> list[int]:
    """The global indices of one dim that the rank at `coords` holds, in its own order."""
    return list(_indices(dim, mesh, tuple(coords[a] for a in axes_of(dim))))


@cache
def _indices(dim: Dim, mesh: Mesh, place: tuple[int, ...]) -> tuple[int, ...]:
    held, coords = [0], dict(zip(axes_of(dim), place, strict=True))
    for size, axes in dim:
        run = list(range(size))
        for axis in axes:
            pieces = [p.tolist() for p in torch.tensor(run).chunk(mesh[axis])] if run else []
            run = pieces[coords[axis]] if coords[axis] < len(pieces) else []
        held = [i * size + j for i in held for j in run]
    return tuple(held)


def cut(tensor: torch.Tensor, spec: Spec, mesh: Mesh, coords: Mapping[str, int]) -> torch.Tensor:
    """A rank's piece; where it is one block, a view with the whole tensor's strides, as a slice would be."""
    for d, dim in enumerate(spec.dims):
        run = indices(dim, mesh, coords)
        if run and run == list(range(run[0], run[0] + len(run))):
            tensor = tensor.narrow(d, run[0], len(run))
        else:
            tensor = tensor.index_select(d, torch.tensor(run, dtype=torch.int64))
    return tensor


def shares(tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Summands of a tensor, one per rank, each full of other numbers."""
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        parts = [torch.randint(-9, 9, tensor.shape).to(tensor.dtype) for _ in range(ranks - 1)]
    else:
        parts = [torch.randn(tensor.shape, dtype=tensor.dtype) for _ in range(ranks - 1)]
    return [*parts, tensor - sum(parts)]


def join(pieces: Sequence[torch.Tensor], spec: Spec, mesh: Mesh) -> torch.Tensor:
    """The global tensor. Raises ValueError for pieces of a wrong shape, or ranks that disagree on a value."""
    pending = [a for a, _ in spec.pending]
    others = [a for a in mesh.names if a not in pending]
    out = torch.zeros(spec.shape, dtype=pieces[0].dtype)
    seen = torch.zeros(spec.shape, dtype=torch.bool)
    for point in itertools.product(*(range(mesh[a]) for a in others)):
        coords = dict(zip(others, point, strict=True))
        piece = _combined(pieces, spec, mesh, coords)
        runs = [indices(dim, mesh, coords | dict.fromkeys(pending, 0)) for dim in spec.dims]
        if piece.shape != tuple(len(r) for r in runs):
            said = [len(r) for r in runs]
            raise ValueError(f"rank {coords} holds {list(piece.shape)}, its layout says {said}")
        if math.prod(piece.shape) == 0:
            continue
        at = torch.meshgrid(*(torch.tensor(r) for r in runs), indexing="ij") if runs else ()
        if seen[at].any() and not same(out[at], piece):
            raise ValueError(f"rank {coords} holds other values than a rank before it")
        out[at], seen[at] = piece, True
    return out


def _combined(pieces: Sequence[torch.Tensor], spec: Spec, mesh: Mesh, coords: dict[str, int]) -> torch.Tensor:
    """The pieces of the ranks at `coords`, reduced over the mesh dims the value is pending over."""
    mine = [i for i in range(mesh.size) if coords.items() <= mesh.coords(i).items()]
    reductions = {op for _, op in spec.pending}
    if len(reductions) > 1:
        raise ValueError(f"pending in two ways: {spec}")
    out, *rest = (pieces[i] for i in mine)
    for piece in rest:
        out = COMBINE[next(iter(reductions))](out, piece)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal: exactly for integers and bools, to rounding for the rest."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point and not a.dtype.is_complex:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
