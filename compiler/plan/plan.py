"""What the user wishes: one entry per mesh dim, each a dict of patterns, a style, `Replicated` or `FullyShard`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.distributed.tensor import Placement

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.entries import DataEntry
from shardc.compiler.plan.layout import PLACEMENTS, placement_code, shown, unknown_mesh_dim
from shardc.compiler.plan.styles import is_style, read_style, style_text
from shardc.compiler.plan.wishes import Wish
from shardc.compiler.user_code import call_site


@dataclass(frozen=True, init=False)
class Plan:
    """One entry per mesh dim, earlier ones winning conflicts.

    An entry is `Replicated(...)`, `FullyShard(...)`, a style for the root module, or a dict. Its keys are
    patterns over FQNs, matched per path component; a key that writes a name out wins over patterns, and one
    that names a parameter over the style of its module. Its values are torch's style objects, strings of
    Hugging Face's `tp_plan`, or, for a parameter, a torch placement.

    Raises PlanError for an entry or a style that is none of these.
    """

    entries: dict[str, dict[str, object] | DataEntry]
    wishes: dict[str, tuple[Wish, ...]] = field(compare=False)  # the entries, read
    where: str = field(compare=False)  # "train.py:12", where the user wrote it

    def __init__(self, **entries: object) -> None:
        kept = {axis: _entry(axis, entry) for axis, entry in entries.items()}
        wishes = {axis: read_entry(axis, entry) for axis, entry in kept.items()}
        self.__dict__.update(entries=kept, wishes=wishes, where=call_site())

    def __repr__(self) -> str:
        return f"Plan({', '.join(f'{axis}={_text(entry)}' for axis, entry in self.entries.items())})"


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
    if not _is_entry(plan) and not is_style(plan):
        raise PlanError(
            f"the plan is {shown(plan)}",
            help="write a Plan, a dict of patterns, or a style for the root module",
        )
    if isinstance(plan, Mapping) and plan and all(_is_entry(v) for v in plan.values()):
        raise PlanError("the plan is a dict of mesh dims", help="write Plan(**plan): a bare dict has patterns as keys")
    if len(names) != 1:
        last = names[-1] if names else "tp"
        text = "{...}" if isinstance(plan, Mapping) else _text(Plan(**{last: plan}).entries[last])
        raise PlanError(
            f"the plan does not say which mesh dim it is for, and the mesh has {', '.join(names) or 'none'}",
            help=f"write Plan({last}={text})",
        )
    return Plan(**{names[0]: plan})


def read_entry(axis: str, entry: Mapping[str, object] | DataEntry, text: str = "", root: str = "") -> tuple[Wish, ...]:
    """An entry in the form that all are read into. root, text: of an annotation, its module and how it is written.

    Raises PlanError for a key or a style that makes no sense.
    """
    text = text or f"{axis} = {entry!r}"
    if isinstance(entry, DataEntry):
        return (Wish(axis, entry.about, entry, text, root),)
    return tuple(_line(axis, key, value) for key, value in entry.items())


def _line(axis: str, key: object, value: object) -> Wish:
    if not isinstance(key, str):
        raise PlanError(f"{axis} has the key {shown(key)}", help="a key is a pattern over module or parameter names")
    place = f'{axis}["{key}"]' if key else axis
    if _is_entry(value):
        raise PlanError(
            f"{place} is {shown(value)}",
            help="FullyShard, Replicated and dicts are for a whole mesh dim: Plan(dp=FullyShard(...))",
        )
    style = read_style(value, place)
    means = {Placement: ("tensors",), str: ("modules", "tensors")}
    named = next((names for kind, names in means.items() if isinstance(value, kind)), ("modules",))
    return Wish(axis, (key,), style, f"{place} = {style_text(value)}", means=named)


def _entry(axis: str, value: object) -> dict[str, object] | DataEntry:
    """An entry as kept: a style alone is for the root module."""
    if isinstance(value, DataEntry):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PLACEMENTS):
        raise PlanError(
            f"{axis} = {placement_code(value)} does not say for which parameter",
            help=f'write {axis}={{"weight": {placement_code(value)}}}',
        )
    if isinstance(value, type) and issubclass(value, DataEntry):
        raise PlanError(f"{axis} is the class {value.__name__}", help=f"write {value.__name__}()")
    return {"": value}


def _is_entry(value: object) -> bool:
    return isinstance(value, (Mapping, DataEntry))


def _text(entry: Mapping[str, object] | DataEntry) -> str:
    """An entry as it would be written."""
    if isinstance(entry, Mapping):
        return "{" + ", ".join(f'"{key}": {style_text(value)}' for key, value in entry.items()) + "}"
    return repr(entry)
