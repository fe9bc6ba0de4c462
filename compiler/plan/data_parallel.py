"""Replicated, FullyShard and annotations meet the model: units, placements, whose gradients stay local."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import Placement, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.annotate import Annotation
from shardc.compiler.plan.match import Index, Unmatched, find, join
from shardc.compiler.plan.plan import FullyShard, Replicated
from shardc.compiler.plan.wording import placement_code, shown

MIB = 1024 * 1024


@dataclass(frozen=True)
class Group:
    """An entry over the module `root` and what it holds; `key` is how the user wrote it."""

    root: str
    entry: Replicated | FullyShard
    key: str


@dataclass(frozen=True)
class Cover:
    """What a data mesh dim does with one parameter."""

    key: str
    unit: str | None = None
    placement: Shard | None = None
    local: bool = False  # its gradient is not reduced
    note: str = ""


@dataclass
class Data:
    """What one data mesh dim does, by canonical parameter names."""

    covers: dict[str, Cover] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)  # trainable, and in no annotated module
    bucket_bytes: int | None = None
    reduce_dtype: torch.dtype | None = None
    unit_reshard: dict[str, bool | int] = field(default_factory=dict)
    unmatched: list[Unmatched] = field(default_factory=list)


def from_entry(axis: str, entry: Replicated | FullyShard) -> list[Group]:
    """The plan's entry as a group over the whole model."""
    return [Group("", entry, f"{axis} = {entry!r}")]


def from_annotations(notes: list[tuple[str, Annotation]], index: Index) -> list[Group]:
    """Annotations of one mesh dim as groups."""
    return [Group(index.module(fqn), note.entry, note.text(fqn)) for fqn, note in notes]


def resolve_data(axis: str, groups: list[Group], index: Index, size: int) -> Data:
    """What a data mesh dim of this size does with each parameter.

    Raises PlanError for options that do not fit the model or the mesh, or contradict each other.
    """
    out = Data()
    units: dict[str, Group] = {}
    for group in groups:
        for unit in _units(axis, group, index, out):
            units[unit] = group
    spared = {id(group): _spared(axis, group, index, out) for group in groups}
    for name in index.parameters:
        if index.tensor(name) == name:
            out.covers[name] = _cover(axis, name, units, spared, index, out)
    _options(axis, groups, units, size, out)
    return out


def _units(axis: str, group: Group, index: Index, out: Data) -> list[str]:
    """Canonical names of the modules that an entry names; FullyShard's root takes what is left."""
    entry = group.entry
    units = [group.root] if isinstance(entry, FullyShard) else []
    for pattern in entry.patterns if isinstance(entry, FullyShard) else entry.modules:
        found = find(join(group.root, pattern), index.modules)
        if not found:
            text = f'{axis} = {type(entry).__name__}("{pattern}")'
            out.unmatched.append(Unmatched(text, pattern, index.modules))
        units += [index.module(name) for name in found]
    return units


def _spared(axis: str, group: Group, index: Index, out: Data) -> set[str]:
    """Canonical names of the parameters that an entry leaves alone."""
    if isinstance(group.entry, Replicated):
        modules = [m for item in group.entry.ignored_modules for m in _ignored_modules(axis, item, group, index, out)]
        ignored = set(modules)
        return {
            name
            for name in index.parameters
            if index.tensor(name) == name
            and all(ignored & set(index.ancestors(alias)) for alias in index.names_of(name))
        }
    spared: set[str] = set()
    for item in group.entry.ignored_params:
        if isinstance(item, nn.Parameter):
            found = [name for name, p in index.parameters.items() if p is item]
            if not found:
                raise PlanError(
                    f"{axis}: ignored_params holds a parameter that the model does not have",
                    help="give a parameter of this model, or a pattern of its names",
                )
        else:
            found = find(join(group.root, item), index.parameters)
            if not found:
                text = f'{axis}: ignored_params "{item}"'
                out.unmatched.append(Unmatched(text, item, index.parameters))
        spared |= {index.tensor(name) for name in found}
    return spared


def _ignored_modules(axis: str, item: str | nn.Module, group: Group, index: Index, out: Data) -> list[str]:
    if isinstance(item, nn.Module):
        name = index.name_of(item)
        if name is None:
            raise PlanError(
                f"{axis}: ignored_modules holds a {type(item).__name__} that the model does not have",
                help="give a module of this model, or a pattern of its names",
            )
        return [name]
    found = find(join(group.root, item), index.modules)
    if not found:
        out.unmatched.append(Unmatched(f'{axis}: ignored_modules "{item}"', item, index.modules))
    return [index.module(name) for name in found]


def _innermost(name: str, units: dict[str, Group], index: Index) -> str | None:
    """The innermost unit that holds a parameter under all its names, else under the first that has one."""
    lines = [index.ancestors(alias) for alias in index.names_of(name)]
    shared = [m for m in lines[0] if m in units and all(m in line for line in lines)]
    return next((m for m in [*shared, *(m for line in lines for m in line)] if m in units), None)


def _cover(
    axis: str, name: str, units: dict[str, Group], spared: dict[int, set[str]], index: Index, out: Data
) -> Cover:
    unit = _innermost(name, units, index)
    parameter = index.parameters[name]
    local = f"its gradient stays local over {axis}" if parameter.requires_grad else ""
    if unit is None:
        if parameter.requires_grad:
            out.outside.append(name)
        return Cover("", local=True, note=local)
    group = units[unit]
    if name in spared[id(group)]:
        return Cover(group.key, local=True, note=local)
    if isinstance(group.entry, Replicated):
        return Cover(group.key)
    if parameter.ndim == 0:
        return Cover(group.key, unit, note=f"a scalar stays whole over {axis}")
    return Cover(group.key, unit, _placement(axis, group, name, parameter))


def _placement(axis: str, group: Group, name: str, parameter: nn.Parameter) -> Shard:
    assert isinstance(group.entry, FullyShard)
    chosen = group.entry.placement(parameter) if group.entry.placement else None
    if chosen is None:
        return Shard(0)
    if not isinstance(chosen, Shard) or not -parameter.ndim <= chosen.dim < parameter.ndim:
        text = placement_code(chosen) if isinstance(chosen, Placement) else shown(chosen)
        raise PlanError(
            f"{axis}: placement gives {text} for {name}, which has {parameter.ndim} dims",
            help="return Shard(d) for one of its dims, or None for Shard(0)",
        )
    return Shard(chosen.dim % parameter.ndim)


def _options(axis: str, groups: list[Group], units: dict[str, Group], size: int, out: Data) -> None:
    """Options of the mesh dim: the smallest bucket, the one dtype, and resharding by unit."""
    buckets = [int(g.entry.bucket_mb * MIB) for g in groups if isinstance(g.entry, Replicated)]
    out.bucket_bytes = min(buckets, default=None)
    dtypes = {g.entry.reduce_dtype: g.key for g in groups if g.entry.reduce_dtype is not None}
    if len(dtypes) > 1:
        (a, first), (b, second), *_ = dtypes.items()
        raise PlanError(f"{first} reduces in {a}, {second} in {b}, both over {axis}", help="choose one reduce_dtype")
    out.reduce_dtype = next(iter(dtypes), None)
    for unit, group in units.items():
        if isinstance(group.entry, FullyShard):
            out.unit_reshard[unit] = _reshard(axis, group, size)


def _reshard(axis: str, group: Group, size: int) -> bool | int:
    assert isinstance(group.entry, FullyShard)
    after = group.entry.reshard_after_forward
    if isinstance(after, bool):
        return after
    if after < 1 or size % after:
        raise PlanError(
            f"{axis}: reshard_after_forward is {after} ranks, but there are {size}",
            help="reshard_after_forward is True, False or a number that divides them",
        )
    return {1: False, size: True}.get(after, after)
