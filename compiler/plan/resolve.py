"""A plan, a model and a mesh become one answer: where every parameter lies, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.annotate import DEFAULT_MESH_DIM, Annotation, annotated
from shardc.compiler.plan.data_parallel import Cover, Data, from_annotations, from_entry, resolve_data
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.keys import Keyed, resolve_keys
from shardc.compiler.plan.layout import unknown_mesh_dim
from shardc.compiler.plan.match import Index, Unmatched, did_you_mean
from shardc.compiler.plan.plan import Entry, Plan, as_plan
from shardc.compiler.plan.resolved import ParamLayout, Resolved
from shardc.compiler.plan.roots import RootLayouts
from shardc.compiler.spec.mesh import Mesh, part_of
from shardc.compiler.spec.spec import Spec, from_placements, to_placements
from shardc.compiler.user_code import call_site, warn_user

Notes = dict[str, list[tuple[str, Annotation]]]  # mesh dim -> (FQN, annotation)


@dataclass
class _Work:
    """What is known so far, by mesh dim; `order` holds those that are planned, annotated ones last."""

    index: Index
    mesh: Mesh
    keyed: dict[str, Keyed] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resolve(
    plan: object,
    module: nn.Module,
    mesh: Mesh,
    *,
    inputs: object = None,
    outputs: object = None,
    strict: bool = False,
) -> Resolved:
    """The plan (or, where it is None or lacks a mesh dim, the module's annotations) applied to the model.

    plan, inputs, outputs and strict are those of `compile`. Reads names, shapes and dtypes only, so the
    model may be on meta. Errors point at the line of the plan, or else at that of the call.

    Warns (UserWarning) of an empty plan, an unplanned mesh dim, and keys that match nothing; these are
    PlanErrors where strict. Raises PlanError for whatever the plan says that cannot be.
    """
    try:
        return _resolve(plan, module, mesh, inputs, outputs, strict)
    except PlanError as error:
        raise error.at(plan.where if isinstance(plan, Plan) else call_site()) from None


def mesh_dims(plan: object, module: nn.Module) -> tuple[str, ...]:
    """The mesh dims that a plan and a module's annotations name; none for a bare entry."""
    named = tuple(plan.entries) if isinstance(plan, Plan) else ()
    return tuple(dict.fromkeys([*named, *(note.mesh_dim for _, note in annotated(module))]))


def _resolve(plan: object, module: nn.Module, mesh: Mesh, inputs: object, outputs: object, strict: bool) -> Resolved:
    parsed, index = as_plan(plan, mesh.names), Index(module)
    _check_ready(index)
    notes = _by_mesh_dim(annotated(module), parsed, mesh)
    work = _Work(index, mesh)
    for axis, entry in parsed.entries.items():
        _read_entry(axis, entry, work)
    for axis in [a for a in mesh.names if a in notes]:
        _read_annotations(axis, notes[axis], work)
    data_axes = tuple(a for a in mesh.names if a in work.data)
    roots = RootLayouts(inputs, outputs, module.forward, mesh.names, data_axes)
    _warn(plan, parsed, work, strict)
    return _put_together(work, roots, data_axes, notes)


def _check_ready(index: Index) -> None:
    lazy = [name for name, p in index.tensors.items() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise PlanError(f"{lazy[0]} has no shape yet", help="run the lazy module on one batch before compiling it")


def _by_mesh_dim(found: Sequence[tuple[str, Annotation]], plan: Plan, mesh: Mesh) -> Notes:
    """Annotations of the mesh dims that the plan leaves to them."""
    out: Notes = {}
    for fqn, note in found:
        axis = note.mesh_dim
        # Who did not name a mesh dim, neither here nor on the mesh, means the only one there is.
        if axis not in mesh and axis == DEFAULT_MESH_DIM and len(mesh.names) == 1 and not plan.entries:
            axis = mesh.names[0]
        if axis not in mesh:
            error = unknown_mesh_dim(axis, mesh.names, note.text(fqn))
            raise PlanError(error.what, where=note.where, help=error.help)
        if axis not in plan.entries:
            out.setdefault(axis, []).append((fqn, note))
    return out


def _read_entry(axis: str, entry: Entry, work: _Work) -> None:
    work.order.append(axis)
    if isinstance(entry, dict):
        work.keyed[axis] = keyed = resolve_keys(axis, entry, work.index)
        work.unmatched += keyed.unmatched
        return
    work.data[axis] = data = resolve_data(axis, from_entry(axis, entry), work.index, work.mesh[axis])
    work.unmatched += data.unmatched


def _read_annotations(axis: str, notes: list[tuple[str, Annotation]], work: _Work) -> None:
    work.order.append(axis)
    groups = from_annotations(notes, work.index)
    work.data[axis] = data = resolve_data(axis, groups, work.index, work.mesh[axis])
    work.unmatched += data.unmatched
    if data.outside:
        more = f" and {len(data.outside) - 1} more" if len(data.outside) > 1 else ""
        work.warnings.append(
            f"no annotation covers {data.outside[0]}{more}: gradients stay local over {axis}; "
            "annotate the whole model too, or list what is meant to be left alone as ignored"
        )


def _warn(plan: object, parsed: Plan, work: _Work, strict: bool) -> None:
    """Says what is odd but not wrong; with `strict`, a key that matches nothing is wrong."""
    for missed in work.unmatched:
        what, help = f"{missed.text} matches nothing", did_you_mean(missed.pattern, missed.names)
        if strict:
            raise PlanError(what, help=help)
        work.warnings.append(f"{what}; {help}" if help else what)
    planned = [axis for axis in work.order if parsed.entries.get(axis) != {}]
    idle = [axis for axis in work.mesh.names if axis not in planned and work.mesh[axis] > 1]
    if planned:
        for axis in idle:
            work.warnings.append(f"nothing is planned for the mesh dim {axis}: its ranks all do the same")
    elif plan is not None or idle:
        work.warnings.append("the plan is empty: the model runs replicated")
    for text in work.warnings:
        warn_user(text)


def _put_together(work: _Work, roots: RootLayouts, data_axes: tuple[str, ...], notes: Notes) -> Resolved:
    index = work.index
    boundaries = [b for keyed in work.keyed.values() for b in keyed.boundaries]
    bordered = {b.module for b in boundaries}
    named = {t for keyed in work.keyed.values() for t in keyed.layouts}
    marked = [n for n in index.modules if n in bordered]
    devices = [n.device_id for found in notes.values() for _, n in found if n.device_id is not None]
    return Resolved(
        mesh=work.mesh,
        params={n: _layout(n, work) for n in index.parameters if index.tensor(n) == n},
        buffers={n: _layout(n, work) for n in index.buffers if n in named},
        boundaries=tuple(boundaries),
        marked=tuple(marked),
        positional={n: Forward.of(index.modules[n].forward).positional for n in marked},
        counts={k: v for keyed in work.keyed.values() for k, v in keyed.counts.items()},
        data_axes=data_axes,
        bucket_bytes={a: d.bucket_bytes for a, d in work.data.items() if d.bucket_bytes is not None},
        reduce_dtype={a: d.reduce_dtype for a, d in work.data.items()},
        roots=roots,
        order=tuple(dict.fromkeys([*work.order, *work.mesh.names])),
        device_id=devices[0] if devices else None,
        unmatched=tuple(u.text for u in work.unmatched),
        warnings=tuple(work.warnings),
    )


def check_placements(plan: Resolved) -> None:
    """Raises PlanError for a parameter that real ranks cannot hold as a DTensor: torch has no placements for it."""
    for layout in plan.params.values():
        if to_placements(layout.stored, plan.mesh) is None:
            order = ", ".join(sorted(layout.stored.axes(), key=lambda axis: axis in layout.unit))
            raise PlanError(
                f"{layout.fqn} would be stored as {layout.stored}, and torch has no placements for such uneven pieces",
                excerpt="\n".join(layout.keys.values()),
                help=f"list the mesh dims as {order}, or shard another dim: FullyShard(placement=lambda p: Shard(1))",
            )


def _layout(name: str, work: _Work) -> ParamLayout:
    """One parameter over all mesh dims; what FullyShard splits lies inside of what a style splits."""
    tensor = work.index.tensors[name]
    claims = {axis: k.layouts[name] for axis, k in work.keyed.items() if name in k.layouts}
    covers = {axis: d.covers[name] for axis, d in work.data.items() if name in d.covers}
    asked = {axis: c.key for axis, c in [*claims.items(), *covers.items()]}
    compute: dict[str, Placement] = {
        axis: c.placement for axis, c in claims.items() if not isinstance(c.placement, Replicate)
    }
    sharded = {axis: c.placement for axis, c in covers.items() if c.placement is not None}
    keys = {a: asked[a] for a in work.order if asked.get(a)}
    try:
        used = from_placements(tensor.shape, compute, work.mesh)
        stored = from_placements(tensor.shape, {**compute, **sharded}, work.mesh)
    except ValueError as error:
        text = "\n".join(keys.values())
        raise PlanError(str(error), excerpt=text, help=f"lay out {name} in another way") from None
    return ParamLayout(
        fqn=name,
        dtype=tensor.dtype,
        requires_grad=tensor.requires_grad,
        stored=stored,
        compute=used,
        kept=_kept(used, sharded, covers, work),
        open=frozenset(axis for axis, c in claims.items() if c.open),
        local=frozenset(axis for axis, c in covers.items() if c.local),
        keys=keys,
        aliases=tuple(work.index.names_of(name)[1:]),
        unit={axis: c.unit for axis, c in covers.items() if c.unit is not None},
        notes=tuple(c.note for c in covers.values() if c.note),
    )


def _kept(spec: Spec, sharded: Mapping[str, Placement], covers: Mapping[str, Cover], work: _Work) -> Spec:
    """The layout between forward and backward: as computed with, or stored, or split over some of the ranks."""
    for axis, placement in sharded.items():
        ways = work.data[axis].unit_reshard[covers[axis].unit or ""]
        if ways:
            spec = spec.place(axis if ways is True else part_of(axis, ways), placement, work.mesh)
    return spec
