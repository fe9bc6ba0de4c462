"""Where a parameter lies: at rest, while computing, between forward and backward; and the table of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
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
class ParamLayout:
    """One parameter (or a buffer that the plan names).

    stored: the layout at rest; compute: while computing; kept: between forward and backward. What FullyShard splits
        is whole in `compute`. What is open is split plainly.
    open: mesh dims whose split comes from a style: the dim is fixed, which factor of it is not.
    local: data mesh dims over which its gradient is not reduced.
    keys: mesh dim -> the plan entry behind its layout, as the user wrote it.
    aliases: further FQNs of the same tensor. unit: FullyShard mesh dim -> FQN of its gather unit. at_rest: what it
        asks, by mesh dim.
    notes: what a reader of the report should know.
    """

    fqn: str
    dtype: torch.dtype
    requires_grad: bool
    stored: Spec
    compute: Spec
    kept: Spec
    open: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()
    keys: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    unit: dict[str, str] = field(default_factory=dict)
    at_rest: dict[str, AtRest] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def computed_as(self, compute: Spec, mesh: Mesh) -> ParamLayout:
        """The same parameter, computed with in another layout, and stored so that it comes by it without a detour.

        Where torch has no placements for the pieces (uneven ones that mesh dims share out in another order than the
        mesh lists them, whole heads of a fused projection), another dim is split, or none: then each rank holds the
        whole and gradients are summed, as of any replicated parameter. Raises ValueError for a dim that the user chose
        and that cannot be split so.
        """
        stored = kept = compute
        notes = list(self.notes)
        for axis, how in self.at_rest.items():
            first = how.placement.dim
            others = [] if how.asked else [d for d in range(len(compute.dims)) if d != first and compute.shape[d] > 1]
            fitting = (d for d in [first, *others] if how.asked or _fits(stored, d, axis, mesh))
            dim = next(fitting, None)
            if dim is None:
                notes.append(f"it stays whole over {axis}: torch has no name for pieces of {stored}")
                continue
            if dim != first:
                what = "torch has no placements for such pieces"
                notes.append(f"it is split over {axis} on dim {dim}: {what} of dim {first}")
            stored = stored.place(axis, Shard(dim), mesh)
            if how.ways:
                kept = kept.place(axis if how.ways is True else part_of(axis, how.ways), Shard(dim), mesh)
        return replace(self, stored=stored, compute=compute, kept=kept, notes=tuple(dict.fromkeys(notes)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def why(self) -> str:
        """The plan entries behind it."""
        return "; ".join(self.keys.values())

    @property
    def gather_unit(self) -> str | None:
        """The unit whose gathers and reductions it takes part in; None where it is not gathered."""
        units = [self.unit[a] for a in self.stored.axes() if a in self.unit]
        return " ".join(dict.fromkeys(units)) if units else None

    def row(self, mesh: Mesh) -> dict[str, Any]:
        """Of the report."""
        # torch.chunk gives its first ranks the most, so no rank holds more than the one at the origin.
        held = math.prod(self.stored.local_shape(mesh, dict.fromkeys(mesh.names, 0)))
        return {
            "fqn": self.fqn,
            "shape": self.shape,
            "dtype": self.dtype,
            "keys": tuple(self.keys.values()),
            "layout": self.stored.text(self.dtype),
            "bytes": self.nbytes,
            "bytes_per_rank": held * self.dtype.itemsize,
            "aliases": self.aliases,
            "notes": self.notes,
        }


def _fits(stored: Spec, dim: int, axis: str, mesh: Mesh) -> bool:
    """Whether torch can name this layout with one more mesh dim inside of what splits the dim."""
    return len(stored.dims[dim]) == 1 and to_placements(stored.place(axis, Shard(dim), mesh), mesh) is not None


class Report(list[dict[str, Any]]):
    """Rows in parameter order, as dicts; `str` of it is the table, `total` the bytes of the fullest rank."""

    def __init__(
        self, rows: Iterable[dict[str, Any]], mesh: Mesh, unmatched: Sequence[str], warnings: Sequence[str]
    ) -> None:
        super().__init__(rows)
        self.mesh, self.unmatched, self.warnings = mesh, tuple(unmatched), tuple(warnings)

    @property
    def total(self) -> int:
        """Bytes of parameters on the fullest rank."""
        return sum(row["bytes_per_rank"] for row in self)

    @property
    def whole(self) -> int:
        """Bytes of all parameters on one device."""
        return sum(row["bytes"] for row in self)

    def __str__(self) -> str:
        cells = [("parameter", "stored", "bytes/rank", "plan")]
        cells += [(r["fqn"], r["layout"], str(r["bytes_per_rank"]), ", ".join(map(_place, r["keys"]))) for r in self]
        cells.append(("total", "", str(self.total), f"of {self.whole}"))
        lines = [str(self.mesh), *_aligned(cells)]
        lines += dict.fromkeys(key for row in self for key in row["keys"] if key != _place(key))
        lines += [f"{row['fqn']} = {alias}" for row in self for alias in row["aliases"]]
        lines += [f"{row['fqn']}: {note}" for row in self for note in row["notes"]]
        lines += [f"matches nothing: {key}" for key in self.unmatched]
        lines += [f"warning: {text}" for text in self.warnings if not any(k in text for k in self.unmatched)]
        return "\n".join(lines)


def _place(key: str) -> str:
    """Where a line stands in the plan: `tp["emb"]` of `tp["emb"] = RowwiseParallel()`."""
    return key.split(" = ")[0]


def _aligned(cells: Sequence[tuple[str, str, str, str]]) -> list[str]:
    wide = [max(len(row[i]) for row in cells) for i in range(3)]
    return [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d}".rstrip() for a, b, c, d in cells]
