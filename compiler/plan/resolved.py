"""A plan that has met its model and mesh: where each parameter lies, what is said at module borders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed.tensor import Placement, Replicate

from shardc.compiler.errors import PlanError
from shardc.compiler.ir.marks import parse_key, parse_placement
from shardc.compiler.plan.layout import Layout, as_layout
from shardc.compiler.plan.match import did_you_mean, find
from shardc.compiler.plan.report import Report
from shardc.compiler.plan.roots import RootLayouts, parse_path
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec


@dataclass(frozen=True)
class ParamLayout:
    """One parameter (or a buffer that the plan names).

    stored: the layout at rest; compute: while computing; kept: between forward and backward. What FullyShard splits
        is whole in `compute`. What is open is split plainly.
    open: mesh dims whose split comes from a style: the dim is fixed, which factor of it is not.
    local: data mesh dims over which its gradient is not reduced.
    keys: mesh dim -> the plan entry behind its layout, as the user wrote it.
    aliases: further FQNs of the same tensor. unit: FullyShard mesh dim -> FQN of its gather unit.
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
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

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


@dataclass(frozen=True)
class Boundary:
    """What a style says about a tensor that enters or leaves a module, over one mesh dim.

    index: position among the positional arguments, name of a keyword argument, or position in a tuple
        that is returned; None for every tensor that is returned.
    declared: how an incoming value lies (None: however it does). It describes a root input; inside the
        program a value lies as it lies.
    desired: what the module takes, or what leaves it; None: as it is. Dims may be negative.
    open: the style chose `desired`, so which factor of the dim it splits is open.
    explicit: the user wrote a layout that is not the style's default.
    """

    module: str
    side: Literal["in", "out"]
    index: int | str | None
    axis: str
    declared: Placement | None
    desired: Placement | None
    open: bool
    explicit: bool
    key: str


@dataclass(frozen=True)
class Resolved:
    """Everything that passes need to know of a plan.

    params: canonical FQN -> layout, every parameter once, in `named_parameters` order. buffers: those
        that the plan names; all others are whole on every rank.
    marked: the modules in `boundaries`, root ("") included, in `named_modules` order.
    positional: marked module -> names of the positional parameters of its forward.
    counts: (module, side) -> length of the list of layouts given for it, for `check_count`.
    data_axes: mesh dims that split the batch, in mesh order.
    bucket_bytes, reduce_dtype: options per mesh dim.
    order: all mesh dims, those of the plan first, as it lists them.
    unmatched: plan keys that name nothing. warnings: what was warned of.
    """

    mesh: Mesh
    params: dict[str, ParamLayout]
    buffers: dict[str, ParamLayout]
    boundaries: tuple[Boundary, ...]
    marked: tuple[str, ...]
    positional: dict[str, tuple[str, ...]]
    counts: dict[tuple[str, str], int]
    data_axes: tuple[str, ...]
    bucket_bytes: dict[str, int]
    reduce_dtype: dict[str, torch.dtype | None]
    roots: RootLayouts
    order: tuple[str, ...]
    device_id: int | torch.device | None = None
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def input_layout(self, name: str, ndim: int) -> dict[str, Placement]:
        """Mesh dim -> placement of a root input, given its readable path: `x`, `batch['ids']`, `args[0]`."""
        return self.roots.input_layout(name, ndim)

    def output_layout(self, path: str, ndim: int) -> dict[str, Placement]:
        """Mesh dim -> placement of a root output, given its readable path: `output`, `output[0]`, `[0]`."""
        return self.roots.output_layout(path, ndim)

    def at(self, key: str) -> list[Boundary]:
        """What is said of the value that a mark with this key (`FQN|in|PATH`) stands for, one per mesh dim.

        What is said of a positional argument holds for it passed by keyword too, and for every tensor in it.
        """
        mark = parse_key(key)
        keys = parse_path(mark.path.removeprefix("kw:"))
        first = keys[0] if keys else None
        names = self.positional.get(mark.fqn, ())
        meant = {first, None} if mark.kind == "out" else {first}
        if mark.kind == "in" and isinstance(first, int) and first < len(names):
            meant.add(names[first])
        elif mark.kind == "in" and first in names:
            meant.add(names.index(first))
        return [b for b in self.boundaries if b.module == mark.fqn and b.side == mark.kind and b.index in meant]

    def constraint(self, text: str) -> dict[str, Placement]:
        """Mesh dim -> placement for every mesh dim, of a `constrain` mark's text; not named means replicate.

        Raises PlanError for a bare placement on a mesh of several dims, and for unknown mesh dims.
        """
        layout = Layout.from_text(text) if "=" in text or not text else parse_placement(text)
        given = as_layout(layout, self.mesh.names, "the layout given to constrain")
        return {axis: given.get(axis, Replicate()) for axis in self.mesh.names}

    def canonical(self, name: str) -> str:
        """The first FQN of a parameter that may be tied; other names are returned as they are."""
        if name in self.params:
            return name
        return next((fqn for fqn, layout in self.params.items() if name in layout.aliases), name)

    def layout(self, name: str) -> ParamLayout | None:
        """Of a parameter under any of its names, or of a buffer that the plan names; other buffers have none."""
        return self.params.get(self.canonical(name)) or self.buffers.get(name)

    def of_units(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """The parameters of the units that match; of one that is in no unit any module around it counts as its own.

        Raises PlanError for a pattern that matches none.
        """
        units = {fqn: set(layout.unit.values()) or _around(fqn) for fqn, layout in self.params.items()}
        names = {unit for of in units.values() for unit in of}
        found = {pattern: find(pattern, names) for pattern in patterns}
        for pattern, matched in found.items():
            if not matched:
                raise PlanError(f"no unit matches {pattern!r}", help=did_you_mean(pattern, sorted(names)))
        wanted = {name for matched in found.values() for name in matched}
        return tuple(fqn for fqn, of in units.items() if of & wanted)

    def wire_dtype(self, move: Sequence[object], own: torch.dtype) -> torch.dtype:
        """In which dtype a gradient travels; move: the arguments of its reduction but the operand."""
        at = next(i for i, a in enumerate(move) if a in self.mesh)
        summed = (*move[at + 1 :], "sum")[0] == "sum"
        wanted = self.reduce_dtype.get(str(move[at]))
        return wanted if wanted is not None and summed and own.is_floating_point else own

    def check_count(self, module: str, side: Literal["in", "out"], count: int) -> None:
        """Raises PlanError where a module takes or returns another number of values than its layouts are for.

        A keyword argument that stands for a positional one counts among the positional ones.
        """
        wanted = self.counts.get((module, side), count)
        if wanted != count:
            what = "positional arguments" if side == "in" else "results"
            raise PlanError(
                f"{module or 'the model'} has {count} {what}, but its layouts are for {wanted}",
                help="give one layout for each, None for what is left alone",
            )

    def report(self) -> Report:
        """One row per parameter: name, layout, plan entry, bytes; `str` of it is a table."""
        layouts: Mapping[str, ParamLayout] = {**self.params, **self.buffers}
        return Report([p.row(self.mesh) for p in layouts.values()], self.mesh, self.unmatched, self.warnings)


def _around(fqn: str) -> set[str]:
    parts = fqn.split(".")[:-1]
    return {".".join(parts[:n]) for n in range(len(parts) + 1)}
