"""What the user wishes: one entry per mesh dim, each a dict of patterns, `Replicated` or `FullyShard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import Partial, Placement, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.layout import Layout as Layout
from shardc.compiler.plan.layout import Precision as Precision
from shardc.compiler.plan.layout import bad_option, check_float, unknown_mesh_dim
from shardc.compiler.plan.styles import PLACEMENTS, is_style, read_style
from shardc.compiler.plan.wording import placement_code, shown, style_text
from shardc.compiler.user_code import call_site

Wish = object  # what a key of a plan may have: a style object, a string of tp_plan, or a torch placement


@dataclass(frozen=True, init=False)
class Replicated:
    """Data parallel over a mesh dim: every rank holds all parameters, and gradients are averaged.

    modules: a pattern, or several, of the modules this is about; "" is the whole model. Gradients of
        parameters outside of them stay local.
    ignored_modules: patterns, or modules, that are left alone: their gradients stay local.
    bucket_mb: gradients are reduced together in buckets of up to this many MiB. One of 1 MiB on CPU (20 elsewhere)
        or more is reduced by itself, where it lies: to copy it would cost more than another message.
    reduce_dtype: what they are cast to on the wire.

    Raises PlanError naming the option that makes no sense.
    """

    modules: tuple[str, ...]
    ignored_modules: tuple[str | nn.Module, ...]
    bucket_mb: float
    reduce_dtype: torch.dtype | None

    def __init__(
        self,
        modules: str | Iterable[str] = "",
        *,
        ignored_modules: str | nn.Module | Iterable[str | nn.Module] | None = None,
        bucket_mb: float = 25,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        check_megabytes(bucket_mb, "bucket_mb")
        check_float(reduce_dtype, "reduce_dtype")
        values = {
            "modules": _several(modules, (str,), "modules of Replicated"),
            "ignored_modules": _several(ignored_modules, (str, nn.Module), "ignored_modules of Replicated"),
            "bucket_mb": bucket_mb,
            "reduce_dtype": reduce_dtype,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        options = _changed(self, bucket_mb=25, reduce_dtype=None)
        if self.ignored_modules:
            options["ignored_modules"] = _tuple_text(self.ignored_modules)
        return _call("Replicated", [p for p in self.modules if p], options)


@dataclass(frozen=True, init=False)
class FullyShard:
    """Parameters, gradients and optimizer state split over a mesh dim, gathered unit by unit for computing.

    patterns: each module that matches one is a gather unit; the root takes the rest, or all.
    reshard_after_forward: True frees gathered parameters after forward and gathers them again in
        backward; False keeps them (ZeRO-2); a number keeps them split over so many consecutive ranks.
    placement: function of a parameter -> Shard(d), or None for Shard(0).
    reduce_dtype: what gradients are cast to on the wire.
    ignored_params: parameters, or patterns of their names, left whole on every rank and not reduced.

    Scalars stay whole. Raises PlanError naming the option that makes no sense.
    """

    patterns: tuple[str, ...]
    reshard_after_forward: bool | int
    placement: Callable[[nn.Parameter], Shard | None] | None
    reduce_dtype: torch.dtype | None
    ignored_params: tuple[str | nn.Parameter, ...] = field(compare=False)

    def __init__(
        self,
        *patterns: str,
        reshard_after_forward: bool | int = True,
        placement: Callable[[nn.Parameter], Shard | None] | None = None,
        reduce_dtype: torch.dtype | None = None,
        ignored_params: str | nn.Parameter | Iterable[str | nn.Parameter] | None = None,
    ) -> None:
        if not isinstance(reshard_after_forward, int) or reshard_after_forward < 0:
            raise bad_option("reshard_after_forward", reshard_after_forward, "True, False or a number of ranks")
        if placement is not None and not callable(placement):
            raise bad_option("placement", placement, "a function of the parameter that returns Shard(d)")
        check_float(reduce_dtype, "reduce_dtype")
        values = {
            "patterns": _several(patterns, (str,), "a pattern of FullyShard"),
            "reshard_after_forward": reshard_after_forward,
            "placement": placement,
            "reduce_dtype": reduce_dtype,
            "ignored_params": _several(ignored_params, (str, nn.Parameter), "ignored_params of FullyShard"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        options = _changed(self, reshard_after_forward=True, reduce_dtype=None)
        if self.placement is not None:
            options["placement"] = getattr(self.placement, "__name__", "...")
        if self.ignored_params:
            options["ignored_params"] = _tuple_text(self.ignored_params)
        return _call("FullyShard", list(self.patterns), options)


Entry = dict[str, Wish] | Replicated | FullyShard


@dataclass(frozen=True, init=False)
class Plan:
    """One entry per mesh dim, earlier ones winning conflicts.

    An entry is `Replicated(...)`, `FullyShard(...)`, a style for the root module, or a dict. Its keys are
    patterns over FQNs, matched per path component; a key that writes a name out wins over patterns, and one
    that names a parameter over the style of its module. Its values are torch's style objects, strings of
    Hugging Face's `tp_plan`, or, for a parameter, a torch placement.

    Raises PlanError for an entry or a style that is none of these.
    """

    entries: dict[str, Entry]
    where: str = field(compare=False, repr=False)  # "train.py:12", where the user wrote it

    def __init__(self, **entries: object) -> None:
        object.__setattr__(self, "entries", {axis: _entry(axis, e) for axis, e in entries.items()})
        object.__setattr__(self, "where", call_site())

    def __repr__(self) -> str:
        return f"Plan({', '.join(f'{axis}={entry_text(e)}' for axis, e in self.entries.items())})"


def as_plan(plan: object, names: tuple[str, ...]) -> Plan:
    """Any way to write a plan as a `Plan` for a mesh with these dims; None is an empty one.

    Raises PlanError for an unknown mesh dim, and for a bare entry where the mesh has several dims.
    """
    if plan is None:
        return Plan()
    if isinstance(plan, Plan):
        for axis in plan.entries:
            if axis not in names:
                raise unknown_mesh_dim(axis, names, "the plan")
        return plan
    if not isinstance(plan, (Mapping, Replicated, FullyShard)) and not is_style(plan):
        raise PlanError(
            f"the plan is {shown(plan)}",
            help="write a Plan, a dict of patterns, or a style for the root module",
        )
    if isinstance(plan, Mapping) and plan and all(_is_entry(v) for v in plan.values()):
        raise PlanError("the plan is a dict of mesh dims", help="write Plan(**plan): a bare dict has patterns as keys")
    if len(names) != 1:
        text = entry_text(_entry("the plan", plan)) if not isinstance(plan, Mapping) else "{...}"
        last = names[-1] if names else "tp"
        raise PlanError(
            f"the plan does not say which mesh dim it is for, and the mesh has {', '.join(names) or 'none'}",
            help=f"write Plan({last}={text})",
        )
    return Plan(**{names[0]: plan})


def entry_text(entry: object) -> str:
    """An entry as it would be written."""
    if isinstance(entry, Mapping):
        return "{" + ", ".join(f'"{key}": {wish_text(wish)}' for key, wish in entry.items()) + "}"
    return str(entry) if isinstance(entry, (Replicated, FullyShard)) else wish_text(entry)


def wish_text(wish: Wish) -> str:
    """A style, string or placement as it would be written."""
    return placement_code(wish) if isinstance(wish, Placement) else style_text(wish)


def check_megabytes(value: object, option: str) -> None:
    """Raises PlanError unless the value is a positive number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise bad_option(option, value, "a positive number of MiB")


def _entry(axis: str, value: object) -> Entry:
    if isinstance(value, (Replicated, FullyShard)):
        return value
    if isinstance(value, Mapping):
        return {_key(axis, key): _wish(wish, f'{axis}["{key}"]') for key, wish in value.items()}
    if isinstance(value, PLACEMENTS):
        raise PlanError(
            f"{axis} = {placement_code(value)} does not say for which parameter",
            help=f'write {axis}={{"weight": {placement_code(value)}}}',
        )
    if isinstance(value, type) and issubclass(value, (Replicated, FullyShard)):
        raise PlanError(f"{axis} is the class {value.__name__}", help=f"write {value.__name__}()")
    return {"": _wish(value, axis)}


def _key(axis: str, key: object) -> str:
    if isinstance(key, str):
        return key
    raise PlanError(f"{axis} has the key {shown(key)}", help="a key is a pattern over module or parameter names")


def _wish(value: object, place: str) -> Wish:
    if isinstance(value, Partial):
        raise PlanError(
            f"{place} = {placement_code(value)}: a parameter cannot be stored as a sum that is pending",
            help="write Shard(dim) or Replicate()",
        )
    if _is_entry(value):
        raise PlanError(
            f"{place} is {shown(value)}",
            help="FullyShard, Replicated and dicts are for a whole mesh dim: Plan(dp=FullyShard(...))",
        )
    if not isinstance(value, PLACEMENTS):
        read_style(value, place)
    return value


def _is_entry(value: object) -> bool:
    return isinstance(value, (Mapping, Replicated, FullyShard))


def _several(value: object, kinds: tuple[type, ...], what: str) -> tuple:
    """The value, one of `kinds` or several of them, as a tuple."""
    items = () if value is None else (value,) if isinstance(value, kinds) else value
    if not isinstance(items, Iterable):
        raise PlanError(f"{what} is {shown(value)}", help="write a pattern, or several of them")
    items = tuple(items)
    for item in items:
        if not isinstance(item, kinds):
            raise PlanError(f"{what} is {shown(item)}", help="write a pattern, or several of them")
    return items


def _changed(entry: object, **defaults: object) -> dict[str, object]:
    return {name: getattr(entry, name) for name, value in defaults.items() if getattr(entry, name) != value}


def _call(name: str, patterns: list[str], options: Mapping[str, object]) -> str:
    given = [f'"{p}"' for p in patterns] + [f"{k}={v}" for k, v in options.items()]
    return f"{name}({', '.join(given)})"


def _tuple_text(items: Iterable[object]) -> str:
    texts = (f'"{item}"' if isinstance(item, str) else f"a {type(item).__name__}" for item in items)
    return f"[{', '.join(texts)}]"
