"""A plan, a model and a mesh become one answer: where every parameter lies, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.annotate import DEFAULT_MESH_DIM, Annotation, annotated
from shardc.compiler.plan.call_layouts import CallLayouts
from shardc.compiler.plan.entries import ContextParallel, FullyShard
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.layout import unknown_mesh_dim
from shardc.compiler.plan.match import Names
from shardc.compiler.plan.param_layout import ParamLayout
from shardc.compiler.plan.plan import Plan, as_plan, read_entry
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.plan.settle import Asked
from shardc.compiler.plan.wishes import Wish
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import REPLICATE, from_placements, to_placements
from shardc.compiler.user_code import call_site, warn_user

MIB = 1024 * 1024


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


def _resolve(plan: object, module: nn.Module, mesh: Mesh, inputs: object, outputs: object, strict: bool) -> Resolved:
    parsed, names = as_plan(plan, mesh.names), Names(module)
    lazy = [name for name, p in names.tensors.items() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise PlanError(f"{lazy[0]} has no shape yet", help="run the lazy module on one batch before compiling it")
    notes = annotated(module)
    noted = _of_notes(notes, parsed, mesh)
    wishes = {**parsed.wishes, **{axis: noted[axis] for axis in mesh.names if axis in noted}}  # annotated ones last
    asked = {axis: Asked(axis, lines, names) for axis, lines in wishes.items()}
    data_axes = tuple(axis for axis in mesh.names if axis in asked and asked[axis].shares)
    calls = CallLayouts(inputs, outputs, module.forward, mesh.names)
    params = {name: _layout(name, names, asked, mesh) for name in names.parameters if names.first(name) == name}
    named = [name for name in names.buffers if any(of.claim(name) for of in asked.values())]
    borders = tuple(border for of in asked.values() for border in of.borders())
    marked = [name for name in names.modules if any(border.module == name for border in borders)]
    return Resolved(
        mesh=mesh,
        params=params,
        buffers={name: _layout(name, names, asked, mesh) for name in named},
        borders=borders,
        positional={name: Forward.of(names.modules[name].forward).positional for name in marked},
        counts={key: count for of in asked.values() for key, count in of.counts().items()},
        data_axes=data_axes,
        sequence={a: e.dim for a in data_axes for e in asked[a].shares if isinstance(e, ContextParallel)},
        bucket_bytes=_bucket_bytes(asked),
        reduce_dtype={axis: _reduce_dtype(asked[axis]) for axis in data_axes},
        calls=calls,
        device_id=next(
            (n.device_id for _, n in notes if n.device_id is not None and n.mesh_dim not in parsed.entries), None
        ),
        unmatched=tuple(text for of in asked.values() for text in of.unmatched),
        warnings=_warnings(_outside(noted, params), asked, mesh, plan is not None, strict),
    )


def _of_notes(notes: list[tuple[str, Annotation]], plan: Plan, mesh: Mesh) -> dict[str, list[Wish]]:
    """What annotations wish, by mesh dim, for those that the plan leaves to them."""
    out: dict[str, list[Wish]] = {}
    for fqn, note in notes:
        axis = note.mesh_dim
        # Who did not name a mesh dim, neither here nor on the mesh, means the only one there is.
        if axis not in mesh and axis == DEFAULT_MESH_DIM and len(mesh.names) == 1 and not plan.entries:
            axis = mesh.names[0]
        if axis not in mesh:
            error = unknown_mesh_dim(axis, mesh.names, note.text(fqn))
            raise PlanError(error.what, where=note.where, help=error.help)
        if axis not in plan.entries:
            out.setdefault(axis, []).extend(read_entry(axis, note.entry, note.text(fqn), fqn))
    return out


def _layout(name: str, names: Names, asked: Mapping[str, Asked], mesh: Mesh) -> ParamLayout:
    """One parameter (or buffer) over all mesh dims; what FullyShard splits lies inside of what a style splits."""
    tensor = names.tensors[name]
    found = {axis: of.claim(name) for axis, of in asked.items()}
    claims = {axis: claim for axis, claim in found.items() if claim is not None}
    shared = [axis for axis, of in asked.items() if of.shares and name in names.parameters]
    local = [axis for axis in shared if asked[axis].leaves(found[axis], name)]
    shards = {a: c.wish.asks for a, c in claims.items() if a not in local and isinstance(c.wish.asks, FullyShard)}
    at_rest = {axis: entry.at_rest(name, tensor, axis, mesh[axis]) for axis, entry in shards.items() if tensor.ndim}
    placed = {axis: claim.placement for axis, claim in claims.items() if claim.placement != REPLICATE}
    keys = {axis: claim.wish.text for axis, claim in claims.items()}
    notes = [f"its gradient stays local over {axis}" for axis in local if tensor.requires_grad]
    notes += [f"a scalar stays whole over {axis}" for axis in shards if not tensor.ndim]
    try:
        compute = from_placements(tensor.shape, placed, mesh)
        return ParamLayout(
            fqn=name,
            dtype=tensor.dtype,
            requires_grad=tensor.requires_grad,
            stored=compute,
            compute=compute,
            kept=compute,
            at_rest=at_rest,
            open=frozenset(axis for axis, claim in claims.items() if claim.open),
            local=frozenset(local),
            keys=keys,
            aliases=tuple(names.of(tensor)[1:]),
            unit={axis: claims[axis].module for axis in shards},
            notes=tuple(notes),
        ).computed_as(compute, mesh)
    except ValueError as error:
        raise PlanError(str(error), excerpt="\n".join(keys.values()), help=f"lay out {name} in another way") from None


def _bucket_bytes(asked: Mapping[str, Asked]) -> dict[str, int]:
    """By mesh dim, the smallest bucket that an entry allows."""
    sizes = {axis: [e.bucket_mb for e in of.shares if e.bucket_mb is not None] for axis, of in asked.items()}
    return {axis: int(min(found) * MIB) for axis, found in sizes.items() if found}


def _reduce_dtype(asked: Asked) -> torch.dtype | None:
    """The one dtype that gradients travel in over a mesh dim."""
    pairs = zip(asked.shares, asked.wishes, strict=True)
    dtypes = {entry.reduce_dtype: wish.text for entry, wish in pairs if entry.reduce_dtype is not None}
    if len(dtypes) > 1:
        (a, first), (b, second), *_ = dtypes.items()
        what = f"{first} reduces in {a}, {second} in {b}, both over {asked.axis}"
        raise PlanError(what, help="choose one reduce_dtype")
    return next(iter(dtypes), None)


def _outside(noted: Iterable[str], params: Mapping[str, ParamLayout]) -> list[str]:
    """Says which parameters that are trained no annotation covers, by annotated mesh dim."""
    out = []
    for axis in noted:
        trained = [layout for layout in params.values() if layout.requires_grad]
        outside = [layout.fqn for layout in trained if axis in layout.local and axis not in layout.keys]
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        out += [
            f"no annotation covers {name}{more}: gradients stay local over {axis}; "
            "annotate the whole model too, or list what is meant to be left alone as ignored"
            for name in outside[:1]
        ]
    return out


def _warnings(
    warnings: list[str], asked: Mapping[str, Asked], mesh: Mesh, given: bool, strict: bool
) -> tuple[str, ...]:
    """Says these and what else is odd but not wrong; with `strict`, a key that matches nothing is wrong."""
    for text, help in (missed for of in asked.values() for missed in of.unmatched.items()):
        if strict:
            raise PlanError(f"{text} matches nothing", help=help)
        warnings.append(f"{text} matches nothing; {help}".removesuffix("; "))
    planned = [axis for axis, of in asked.items() if of.wishes]
    idle = [axis for axis in mesh.names if axis not in planned and mesh[axis] > 1]
    if planned:
        warnings += [f"nothing is planned for the mesh dim {axis}: its ranks all do the same" for axis in idle]
    elif given or idle:
        warnings.append("the plan is empty: the model runs replicated")
    for text in warnings:
        warn_user(text)
    return tuple(warnings)
