"""A plan that has met its model and mesh: where each parameter lies, what is said at module borders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.distributed.tensor import Placement, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.ir.marks import CONSTRAIN, parse_key, parse_placement
from shardc.compiler.plan.call_layouts import CallLayouts, parse_path
from shardc.compiler.plan.layout import Layout, as_layout
from shardc.compiler.plan.match import did_you_mean, find
from shardc.compiler.plan.param_layout import ParamLayout, Report
from shardc.compiler.plan.wishes import Border
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import REPLICATE, Spec


@dataclass(frozen=True)
class Resolved:
    """Everything that passes need to know of a plan.

    params: canonical FQN -> layout, every parameter once, in `named_parameters` order. buffers: those
        that the plan names; all others are whole on every rank.
    positional: the modules in `borders`, root ("") included, in `named_modules` order -> the names of the positional
        parameters of forward.
    counts: (module, side) -> length of the list of layouts given for it, for `check_count`.
    data_axes: mesh dims that split the batch or its sequences, in mesh order. sequence: of the latter, the dim of
        inputs that they split.
    bucket_bytes, reduce_dtype: options per mesh dim.
    unmatched: plan keys that name nothing. warnings: what was warned of.
    """

    mesh: Mesh
    params: dict[str, ParamLayout]
    buffers: dict[str, ParamLayout]
    borders: tuple[Border, ...]
    positional: dict[str, tuple[str, ...]]
    counts: dict[tuple[str, str], int]
    data_axes: tuple[str, ...]
    bucket_bytes: dict[str, int]
    reduce_dtype: dict[str, torch.dtype | None]
    calls: CallLayouts
    device_id: int | torch.device | None = None
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sequence: Mapping[str, int] = field(default_factory=dict)

    def root_layout(
        self,
        side: Literal["in", "out"],
        name: str,
        ndim: int,
        marks: Iterable[str] = (),
        rows: int | None = 0,
        lengths: Mapping[str, int | None] | None = None,
    ) -> dict[str, Placement]:
        """Mesh dim -> placement of an input or output of the model: the caller's word, else what the module it meets
        says, else the default. name: its readable path, as in `CallLayouts.given`; marks: those that it meets. rows:
        the dim along which it is a part of the batch; None where it is none. lengths: mesh dim -> the dim along which
        it is a part of the sequence, likewise; by default that of inputs.

        A root style, or a layout the user wrote on a module that is fed by this input itself, describes what is
        passed in; defaults of styles do not.
        """
        given = self.calls.given(side, name, ndim)
        if given is not None:
            return given
        split = {axis: Shard(rows) for axis in self.batch_axes} if rows is not None and ndim else {}
        declared = self._declared(side, marks)
        for axis, dim in (self.sequence if lengths is None else lengths).items() if ndim else ():
            if axis in declared or dim is None:
                continue
            if dim >= ndim:
                raise _no_length(name, ndim, axis, dim, split)
            split[axis] = Shard(dim)
        return split | declared

    def told(
        self, side: Literal["in", "out"], name: str, ndim: int, marks: Iterable[str]
    ) -> dict[str, Placement] | None:
        """`root_layout`, where it is no default over any data-parallel mesh dim; else None."""
        given = self.calls.given(side, name, ndim)
        declared = self._declared(side, marks) if given is None else given
        return declared if given is not None or {*self.batch_axes} <= {*declared} else None

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh dims that split the rows of the batch."""
        return tuple(axis for axis in self.data_axes if axis not in self.sequence)

    def _declared(self, side: str, marks: Iterable[str]) -> dict[str, Placement]:
        out: dict[str, Placement] = {}
        keys = [key for key in marks if parse_key(key).kind == side and not parse_key(key).grad]
        for border in (border for key in keys for border in self.at(key)):
            layout = border.declared if side == "in" else border.desired
            if layout is not None and (border.module == "" or border.explicit):
                out.setdefault(border.axis, layout)
        return out

    @property
    def marked(self) -> tuple[str, ...]:
        """The modules whose borders tracing marks."""
        return tuple(self.positional)

    @property
    def declares_inside(self) -> bool:
        """Whether what a root input is can only be known from the graph: some inner module's style says it."""
        return any(b.side == "in" and b.explicit and b.module for b in self.borders)

    def at(self, key: str) -> list[Border]:
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
        return [b for b in self.borders if b.module == mark.fqn and b.side == mark.kind and b.index in meant]

    def wished(self, key: str) -> tuple[tuple[str, Placement, bool, str], ...]:
        """What is wished of the value that a mark with this key stands for: (mesh dim, placement, open, reason).

        A constraint speaks of every mesh dim: those that it does not name replicate. Raises PlanError for one with
        a bare placement on a mesh of several dims, and for unknown mesh dims.
        """
        mark = parse_key(key)
        if mark.kind != CONSTRAIN:
            return tuple((b.axis, b.desired, b.open, b.key) for b in self.at(key) if b.desired is not None)
        layout = parse_placement(mark.text) if mark.text and "=" not in mark.text else Layout.from_text(mark.text)
        given = as_layout(layout, self.mesh.names, "the layout given to constrain")
        return tuple((axis, given.get(axis, REPLICATE), False, CONSTRAIN) for axis in self.mesh.names)

    def layout(self, name: str) -> ParamLayout | None:
        """Of a parameter under any of its names, or of a buffer that the plan names; other buffers have none."""
        found = self.params.get(name) or self.buffers.get(name)
        return found or next((layout for layout in self.params.values() if name in layout.aliases), None)

    @property
    def has_shards(self) -> bool:
        """Whether ranks hold pieces of some parameter. All are DTensors then: torch's own clip_grad_norm_, and
        optimizers that step on many at once, take no two kinds."""
        return any(not layout.stored.is_whole for layout in self.params.values())

    def stored(self, name: str, shape: Sequence[int]) -> Spec:
        """How a parameter or buffer of this shape lies at rest."""
        layout = self.layout(name)
        return Spec.whole(shape) if layout is None else layout.stored

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


def _no_length(name: str, ndim: int, axis: str, dim: int, beside: Iterable[str]) -> PlanError:
    layout = ", ".join(f"{other}=Shard(0)" for other in beside)
    return PlanError(
        f"{name} has {ndim} dims, and {axis} = ContextParallel splits dim {dim}",
        help=f"say how it lies: compile(..., inputs={{{name!r}: Layout({layout})}})",
    )


def _around(fqn: str) -> set[str]:
    parts = fqn.split(".")[:-1]
    return {".".join(parts[:n]) for n in range(len(parts) + 1)}
