"""How FullyShard keeps a parameter: split inside of what a style splits, on a dim where torch can say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.tensor import Shard

from shardc.compiler.spec.mesh import Mesh, part_of
from shardc.compiler.spec.spec import Spec, to_placements


@dataclass(frozen=True)
class AtRest:
    """What FullyShard asks for one parameter over one mesh dim. ways: over how many ranks it stays split between
    forward and backward, True for all and False for none. asked: the user chose the dim."""

    placement: Shard
    ways: bool | int
    asked: bool


@dataclass(frozen=True)
class Rest:
    """stored: the layout at rest; kept: between forward and backward. notes: where that is not as asked first."""

    stored: Spec
    kept: Spec
    notes: tuple[str, ...] = ()


def rest(compute: Spec, shards: Mapping[str, AtRest], mesh: Mesh) -> Rest:
    """What is computed with in this layout, at rest. Where torch has no placements for the pieces (uneven ones that
    mesh dims share out in another order than the mesh lists them, whole heads of a fused projection), another dim is
    split, or none: then each rank holds the whole and gradients are summed, as of any replicated parameter.

    Raises ValueError for a dim that the user chose and that cannot be split so.
    """
    stored = kept = compute
    notes: list[str] = []
    for axis, how in shards.items():
        first = how.placement.dim
        others = [] if how.asked else [d for d in range(len(compute.dims)) if d != first and compute.shape[d] > 1]
        fitting = (d for d in [first, *others] if how.asked or _fits(stored, d, axis, mesh))
        dim = next(fitting, None)
        if dim is None:
            notes.append(f"it stays whole over {axis}: torch has no name for pieces of {stored}")
            continue
        if dim != first:
            notes.append(
                f"it is split over {axis} on dim {dim}: torch has no placements for such pieces of dim {first}"
            )
        stored = stored.place(axis, Shard(dim), mesh)
        if how.ways:
            kept = kept.place(axis if how.ways is True else part_of(axis, how.ways), Shard(dim), mesh)
    return Rest(stored, kept, tuple(notes))


def _fits(stored: Spec, dim: int, axis: str, mesh: Mesh) -> bool:
    """Whether torch can name this layout with one more mesh dim inside of what splits the dim."""
    return len(stored.dims[dim]) == 1 and to_placements(stored.place(axis, Shard(dim), mesh), mesh) is not None
