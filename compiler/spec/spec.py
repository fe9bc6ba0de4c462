"""The layout of one value over a mesh, dim by dim: `f32[32@dp, 64]+tp`.

A dim is a product of parts, major to minor; each part may be split over mesh dims, in order:

    12@tp        twelve rows in torch.chunk pieces over tp
    64@dp.tp     chunks over dp, each chunked again over tp
    (3@tp 4)     three heads of four, split by whole heads
    (3 8@tp)     a fused q, k, v split inside each third (torch's _StridedShard)
    64@dp/2      chunks over every two consecutive ranks of dp

A rank holds exactly its rows: ceil(n / w) per rank, trailing ranks short or empty, never padding.
Beside its dims a value may be *pending*: each rank holds a summand (or an operand of max, min, ...)
over some mesh dims. A mesh dim occurs at most once in a spec.

One canonical form: a split that a plain one would describe equally is written plainly, and of two compound
ones that say the same, the one with the larger blocks. (Splits of a size of one have several spellings.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard, _StridedShard

from shardc.compiler.spec.mesh import Mesh, place
from shardc.compiler.spec.sizes import DataSize, of_data

DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


class Part(NamedTuple):
    """A stretch of `size` indices and the mesh dims that split it, outermost first."""

    size: int
    axes: tuple[str, ...] = ()


REPLICATE = Replicate()

Dim = tuple[Part, ...]


def chunk(size: int, mesh: Mesh, axes: Iterable[str], coords: Mapping[str, int]) -> tuple[int, int]:
    """(start, length) of a rank's torch.chunk piece of `size`, chunked again for each further mesh dim."""
    start = 0
    for axis in axes:
        piece = -(-size // mesh[axis])
        low = min(piece * place(coords, axis), size)
        start, size = start + low, min(piece, size - low)
    return start, size


@cache
def _mergeable(a: Part, b: Part, mesh: Mesh) -> bool:
    """Whether (a b) names the same indices on every rank as the one part of size a*b over all their mesh dims."""
    if not b.axes and not a.axes:
        return True
    axes = a.axes + b.axes
    ways = math.prod(mesh[x] for x in a.axes)
    if a.size % ways == 0 and b.size % math.prod(mesh[x] for x in b.axes) == 0:
        return not b.axes or a.size == ways
    for point in itertools.product(*(range(mesh[x]) for x in axes)):
        coords = dict(zip(axes, point, strict=True))
        (a0, an), (b0, bn) = chunk(a.size, mesh, a.axes, coords), chunk(b.size, mesh, b.axes, coords)
        one_run = an <= 1 or bn == b.size
        start, length = chunk(a.size * b.size, mesh, axes, coords)
        if not one_run or an * bn != length or (length and a0 * b.size + b0 != start):
            return False
    return True


@cache
def canonical(dim: Dim, mesh: Mesh) -> Dim:
    """The one way to write this dim: parts merged wherever the plain split means the same."""
    out: list[Part] = []
    for part in dim:
        if part.size == 1 and not part.axes:
            continue
        while out and _mergeable(out[-1], part, mesh):
            part = _merged(out.pop(), part)
        out.append(part)
    for i in range(len(out) - 1):
        out[i : i + 2] = _coarser(out[i], out[i + 1], mesh)
    return tuple(out) or (Part(1),)


def _merged(a: Part, b: Part) -> Part:
    return Part(a.size * b.size, a.axes + b.axes)


def _coarser(a: Part, b: Part, mesh: Mesh) -> tuple[Part, Part]:
    """(a b) with the first part in as few and large blocks as say the same: (4@tp 2) is (2@tp 4) on 3 ranks."""
    for size in range(2, a.size if a.axes else 0):
        halves = _halves(a, size, mesh)
        if halves is not None and _mergeable(halves[1], b, mesh):
            return halves[0], _merged(halves[1], b)
    return a, b


@cache
def regroup(dim: Dim, sizes: tuple[int, ...], mesh: Mesh) -> tuple[Dim, ...] | None:
    """The same dim as consecutive dims of the given sizes, or None where a split crosses a boundary."""
    if len(sizes) == 1:
        return (dim,) if size_of(dim) == sizes[0] else None
    if size_of(dim) != math.prod(sizes):
        return None
    if 0 in sizes:
        return None if axes_of(dim) else tuple((Part(n),) for n in sizes)
    rest = list(reversed(dim))
    groups: list[list[Part]] = []
    for size in sizes:
        need, group = size, []
        while need != 1 or (size == 1 and not group and rest and rest[-1].size == 1):
            part = rest.pop()
            if part.size > need:
                halves = _halves(part, need, mesh)
                if halves is None:
                    return None
                part, after = halves
                rest.append(after)
            if need % part.size:
                return None
            group.append(part)
            need //= part.size
        groups.append(group)
    if groups:
        groups[-1] += reversed(rest)  # parts of size 1: a split one still has an owner rank
    return tuple(canonical(tuple(g), mesh) for g in groups)


def _halves(part: Part, size: int, mesh: Mesh) -> tuple[Part, Part] | None:
    """`part` as (size, rest), if some way of dealing its mesh dims to the two halves means the same."""
    if size == 0 or part.size % size:
        return None
    for k in range(len(part.axes), -1, -1):
        major, minor = Part(size, part.axes[:k]), Part(part.size // size, part.axes[k:])
        if _mergeable(major, minor, mesh):
            return major, minor
    return None


def restrict(dim: Dim, axes: Iterable[str], mesh: Mesh) -> Dim:
    """The dim with only the given mesh dims left splitting it."""
    keep = set(axes)
    return canonical(tuple(Part(p.size, tuple(a for a in p.axes if a in keep)) for p in dim), mesh)


def axes_of(dim: Dim) -> tuple[str, ...]:
    return dim[0].axes if len(dim) == 1 else tuple([axis for part in dim for axis in part.axes])


def size_of(dim: Dim) -> int:
    return dim[0].size if len(dim) == 1 else math.prod(part.size for part in dim)


def dim_text(dim: Dim) -> str:
    parts = [f"{p.size}@{'.'.join(p.axes)}" if p.axes else str(p.size) for p in dim]
    return parts[0] if len(parts) == 1 else f"({' '.join(parts)})"


@dataclass(frozen=True)
class Spec:
    """Layout of one value: its dims, and the mesh dims over which it is pending with their reduction."""

    dims: tuple[Dim, ...]
    pending: tuple[tuple[str, str], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.dims, self.pending)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Spec:
        """Every rank holds all of it."""
        return cls(tuple((Part(n if isinstance(n, DataSize) else int(n)),) for n in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size_of(dim) for dim in self.dims)

    @property
    def of_data(self) -> bool:
        """Whether data decides some size: every rank then holds all of it."""
        return of_data(self.shape)

    @property
    def is_whole(self) -> bool:
        return not self.pending and not any(axes_of(dim) for dim in self.dims)

    def axes(self) -> tuple[str, ...]:
        """Mesh dims that split some dim."""
        return tuple([axis for dim in self.dims for part in dim for axis in part.axes])

    def dim_of(self, axis: str) -> int | None:
        """The dim this mesh dim splits, if any."""
        return next((i for i, dim in enumerate(self.dims) if axis in axes_of(dim)), None)

    def reduction(self, axis: str) -> str | None:
        """How the value is pending over this mesh dim, if it is."""
        return dict(self.pending).get(axis)

    def with_dim(self, i: int, dim: Dim) -> Spec:
        return Spec((*self.dims[:i], dim, *self.dims[i + 1 :]), self.pending)

    def with_pending(self, pending: Mapping[str, str], mesh: Mesh) -> Spec:
        """The same dims, pending as given, in mesh order."""
        return Spec(self.dims, tuple((a, pending[a]) for a in mesh.names if a in pending))

    def without(self, axis: str, mesh: Mesh) -> Spec:
        """Whole over one mesh dim: neither split nor pending."""
        dims = tuple(
            restrict(d, [a for a in axes_of(d) if a != axis], mesh) if axis in axes_of(d) else d for d in self.dims
        )
        return Spec(dims, tuple(p for p in self.pending if p[0] != axis))

    def split(self, i: int, axis: str, mesh: Mesh) -> Spec:
        """Dim i split over one more mesh dim, plainly and innermost."""
        dim = self.dims[i]
        *parts, last = dim
        if len(dim) == 1:
            return self.with_dim(i, canonical((Part(last.size, (*last.axes, axis)),), mesh))
        first = next((k for k, p in enumerate(dim) if not p.axes), len(dim) - 1)
        new = tuple(Part(p.size, (*p.axes, axis)) if k == first else p for k, p in enumerate(dim))
        return self.with_dim(i, canonical(new, mesh))

    def place(self, axis: str, placement: Placement, mesh: Mesh, open: bool = False) -> Spec:
        """This layout with one mesh dim placed as torch says; an open Shard accepts any split of its dim."""
        if isinstance(placement, Partial):
            if self.reduction(axis) == placement.reduce_op:
                return self
            return self.without(axis, mesh).with_pending({**dict(self.pending), axis: placement.reduce_op}, mesh)
        if isinstance(placement, Replicate):
            return self.without(axis, mesh)
        d = shard_dim(placement, len(self.dims))
        if self.dim_of(axis) == d and open:
            return self
        bare = self.without(axis, mesh)
        placed = _split_strided(bare, d, axis, placement, mesh)
        return self if placed == self else placed

    def like(self, other: Spec, i: int, axis: str, mesh: Mesh) -> Spec:
        """Dim i split over one more mesh dim, by the same part as `other` splits it where that still fits."""
        mine = axes_of(self.dims[i])
        wanted = restrict(other.dims[i], (*mine, axis), mesh)
        if restrict(wanted, mine, mesh) == self.dims[i]:
            return self.with_dim(i, wanted)
        return self.split(i, axis, mesh)

    def local_shape(self, mesh: Mesh, coords: Mapping[str, int]) -> tuple[int, ...]:
        """Sizes of what the rank at `coords` holds."""
        return tuple(math.prod(chunk(p.size, mesh, p.axes, coords)[1] for p in dim) for dim in self.dims)

    def text(self, dtype: torch.dtype | None = None) -> str:
        name = DTYPES.get(dtype, str(dtype).removeprefix("torch.")) if dtype is not None else ""
        tail = "".join(f"+{a}" if op == "sum" else f"+{op}({a})" for a, op in self.pending)
        return f"{name}[{', '.join(dim_text(d) for d in self.dims)}]{tail}"

    __str__ = text


def from_placements(shape: Sequence[int], placements: Mapping[str, Placement], mesh: Mesh) -> Spec:
    """The spec of torch placements, one per mesh dim name; mesh dims left out are Replicate.

    Mesh dims on one dim nest in the order given. Raises ValueError for a dim out of range.
    """
    spec, pending = Spec.whole(shape), {}
    for axis, placement in placements.items():
        if isinstance(placement, Partial):
            pending[axis] = placement.reduce_op
        elif not isinstance(placement, Replicate):
            d = shard_dim(placement, len(shape))
            if not _deals_runs(spec.dims[d], mesh[axis], mesh):
                raise _misfit(placement, axis, spec.dims[d])
            spec = _split_strided(spec, d, axis, placement, mesh)
    return spec.with_pending(pending, mesh)


def _deals_runs(dim: Dim, ways: int, mesh: Mesh) -> bool:
    """Whether `Spec.split` deals each rank's indices in runs, as torch's Shard does to what is left of a dim."""
    k = next((i for i, p in enumerate(dim) if not p.axes), len(dim) - 1)
    single = all(p.size == math.prod(mesh[a] for a in p.axes) for p in dim[:k])
    last = all(p.size == 1 for p in dim[k + 1 :])
    return len(dim) == 1 or single and (last or dim[k].size % (ways * math.prod(mesh[a] for a in dim[k].axes)) == 0)


def _misfit(placement: Placement, axis: str, dim: Dim) -> ValueError:
    return ValueError(f"{placement} over {axis} does not fit a dim of layout {dim_text(dim)}")


def shard_dim(placement: Placement, rank: int) -> int:
    """The dim a Shard names, counted from the front. Raises ValueError where the tensor has no such dim."""
    d: int = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
    if not -rank <= d < rank:
        raise ValueError(f"Shard({d}) does not fit a tensor of {rank} dims")
    return d % rank


def _split_strided(spec: Spec, d: int, axis: str, placement: Placement, mesh: Mesh) -> Spec:
    factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
    if factor == 1:
        return spec.split(d, axis, mesh)
    if spec.dims[d] != (Part(spec.shape[d]),) or spec.shape[d] % factor:
        raise _misfit(placement, axis, spec.dims[d])
    return spec.with_dim(d, canonical((Part(factor), Part(spec.shape[d] // factor, (axis,))), mesh))


def to_placements(spec: Spec, mesh: Mesh) -> tuple[Placement, ...] | None:
    """torch placements in mesh order that mean exactly this spec, or None where torch has none."""
    out: dict[str, Placement] = {axis: Partial(op) for axis, op in spec.pending}
    for d, dim in enumerate(spec.dims):
        split = [p for p in dim if p.axes]
        if not split:
            continue
        if len(dim) > 2 or len(split) > 1 or (len(dim) == 2 and dim[0].axes):
            return None
        outer = dim[0].size if len(dim) == 2 else 1
        axes = split[0].axes
        if (outer > 1 or list(axes) != sorted(axes, key=mesh.names.index)) and not _even(split[0], mesh):
            return None
        if outer > 1 and len(axes) > 1:
            return None
        for i, axis in enumerate(axes):
            later = [a for a in axes[:i] if mesh.names.index(a) > mesh.names.index(axis)]
            factor = outer * math.prod(mesh[a] for a in later)
            out[axis] = _StridedShard(d, split_factor=factor) if factor > 1 else Shard(d)
    return tuple(out.get(axis, Replicate()) for axis in mesh.names)


def _even(part: Part, mesh: Mesh) -> bool:
    return part.size % math.prod(mesh[a] for a in part.axes) == 0
