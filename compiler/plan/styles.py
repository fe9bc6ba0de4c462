"""torch's parallel styles, the strings of Hugging Face's `tp_plan` and placements, read into one form and as text.

`use_local_output` and `use_local_input` are accepted and say nothing here: there are no local tensors
in a global view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.layout import PLACEMENTS, placement_code, shown
from shardc.compiler.plan.match import nearest
from shardc.compiler.plan.wishes import Border, Style

_IN = ("input_layouts", "desired_input_layouts", "input_kwarg_layouts", "desired_input_kwarg_layouts")
_OUT = ("output_layouts", "desired_output_layouts")
# The options of each style that say something, and what they are where the user says nothing.
STYLES: dict[type, dict[str, Any]] = {
    ColwiseParallel: {"input_layouts": Replicate(), "output_layouts": Shard(-1)},
    RowwiseParallel: {"input_layouts": Shard(-1), "output_layouts": Replicate()},
    SequenceParallel: {"sequence_sharding": Shard(1)},
    PrepareModuleInput: {name: None for name in _IN},
    PrepareModuleOutput: {name: None for name in _OUT},
    PrepareModuleInputOutput: {name: None for name in _IN + _OUT},
}


def _along(sequence: Placement) -> tuple[Border, ...]:
    # Never explicit: a root input is not taken for a slice because a norm works on slices.
    return (Border("in", 0, sequence, sequence, True, False), Border("out", None, None, sequence, True, False))


_COLUMNS, _ROWS, _WHOLE = Style("columns"), Style("rows"), Style("whole")
_GATHERED = Style(borders=(Border("out", None, None, Replicate()),))
STRINGS: dict[str, Style] = {
    # Of fused gate and up it is open which factor of the dim is split, so their halves can stay together.
    **dict.fromkeys(("colwise", "packed_colwise"), _COLUMNS),
    **dict.fromkeys(("colwise_rep", "colwise_gather_output"), replace(_COLUMNS, gives=Replicate())),
    **dict.fromkeys(("rowwise", "packed_rowwise"), _ROWS),
    **dict.fromkeys(("rowwise_rep", "rowwise_split_input"), replace(_ROWS, takes=Replicate())),
    "embedding_rowwise": replace(_ROWS, table=True),
    "embedding_colwise": replace(_COLUMNS, gives=Replicate(), table=True),
    "sequence_parallel": replace(_WHOLE, borders=_along(Shard(1))),
    # The latter two say which gradients a rank sees only a part of; in a global view no gradient is a part.
    **dict.fromkeys(("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"), _WHOLE),
    **dict.fromkeys(("all_reduce", "moe_tp_experts"), _GATHERED),
    # The former undoes a sum over ranks that a global view never makes.
    **dict.fromkeys(("moe_identity_expert", "local_params"), Style()),
}
REFUSED_STRINGS = ("grouped_gemm", "ep_router", "ep_dispatch_experts", "megamoe_router", "megamoe_experts")


def is_style(value: object) -> bool:
    """Whether a value is meant as a style."""
    return isinstance(value, (ParallelStyle, str))


def read_style(value: object, place: str) -> Style:
    """The one form of a style object, a string or a placement; `place` says where it stands in the plan.

    Raises PlanError for an unknown style, an unknown or unsupported string, and a layout that is none.
    """
    if isinstance(value, Partial):
        raise PlanError(
            f"{place} = {placement_code(value)}: a parameter cannot be stored as a sum that is pending",
            help="write Shard(dim) or Replicate()",
        )
    if isinstance(value, PLACEMENTS):
        return Style(value)
    if isinstance(value, str):
        return _read_string(value, place)
    if type(value) not in STYLES:  # a subclass may override what is read here
        raise _no_style(value, place)
    if isinstance(value, SequenceParallel):
        return replace(_WHOLE, borders=_along(_one(value, "sequence_sharding", place)))
    if isinstance(value, (ColwiseParallel, RowwiseParallel)):
        takes, gives = (_one(value, option, place) for option in ("input_layouts", "output_layouts"))
        usual = STYLES[type(value)]
        return replace(
            _ROWS if isinstance(value, RowwiseParallel) else _COLUMNS,
            takes=None if takes == usual["input_layouts"] else takes,
            gives=None if gives == usual["output_layouts"] else gives,
        )
    given = _options(value)
    lists = {side: given.get(f"{side}put_layouts") for side in ("in", "out")}
    counts = tuple((side, len(layouts)) for side, layouts in lists.items() if layouts is not None)
    return Style(borders=_borders(given, place), counts=counts)


def style_text(value: object) -> str:
    """A style, string or placement as it would be written, options at their default left out."""
    if isinstance(value, Placement):
        return placement_code(value)
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, SequenceParallel):
        (along,) = value.sequence_sharding
        return f"SequenceParallel({'' if along.dim == 1 else f'sequence_dim={along.dim}'})"
    usual = STYLES[type(value)]
    given = {name: _single(option) for name, option in _options(value).items()}
    texts = [f"{name}={_option_text(option)}" for name, option in given.items() if option and option != usual[name]]
    return f"{type(value).__name__}({', '.join(texts)})"


def _options(style: object) -> dict[str, Any]:
    """The options of a style that say something, by name."""
    parts = [getattr(style, side, style) for side in ("prepare_module_input", "prepare_module_output")]
    return {name: getattr(part, name) for name in STYLES[type(style)] for part in parts if hasattr(part, name)}


def _single(option: object) -> object:
    """The only one of several; torch wraps whatever it is given in a tuple of one."""
    return option[0] if isinstance(option, tuple) and len(option) == 1 else option


def _option_text(value: object) -> str:
    if isinstance(value, Placement):
        return placement_code(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{k}": {_option_text(v)}' for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_option_text(v) for v in value)})"
    return str(value)


def _read_string(value: str, place: str) -> Style:
    if value in STRINGS:
        return STRINGS[value]
    if value in REFUSED_STRINGS:
        raise PlanError(
            f'{place} = "{value}": experts dealt out to ranks are not supported',
            help="split every expert instead: give its parameters, by name, a placement on a dim but 0",
        )
    if value == "auto":
        raise PlanError(f'{place} = "auto" is no style', help="pass the dict model.tp_plan")
    raise PlanError(
        f'{place} = "{value}" is not a string of tp_plan',
        help=f'the nearest is "{nearest(value, STRINGS)}"',
    )


def _no_style(value: object, place: str) -> PlanError:
    if isinstance(value, type) and issubclass(value, ParallelStyle):
        return PlanError(f"{place} is the class {value.__name__}", help=f"write {value.__name__}()")
    base = next((s.__name__ for s in STYLES if isinstance(value, s)), None)
    if base:  # its overrides would be left out without a word
        return PlanError(
            f"{place} is a {type(value).__name__}, a subclass of {base}",
            help=f"use {base} itself: what a subclass does at run time is not read",
        )
    return PlanError(
        f"{place} is {shown(value)}, which is no style",
        help="write a style of torch.distributed.tensor.parallel or a string of tp_plan",
    )


def _borders(given: Mapping[str, Any], place: str) -> tuple[Border, ...]:
    """What the options of a style say of each value that crosses the module's border."""
    named, wanted = given.get("input_kwarg_layouts", {}), given.get("desired_input_kwarg_layouts", {})
    for name in sorted(set(wanted) - set(named)):
        raise PlanError(
            f"{place}: desired_input_kwarg_layouts names {name}, which input_kwarg_layouts does not",
            help="give both dicts the same names",
        )
    ins, outs = (
        list(zip(given.get(f"{side}_layouts") or (), given.get(f"desired_{side}_layouts") or (), strict=True))
        for side in ("input", "output")
    )
    said: list[tuple[Literal["in", "out"], int | str | None, Any, Any]] = [
        *(("in", i, *pair) for i, pair in enumerate(ins)),
        *(("in", name, layout, wanted.get(name)) for name, layout in named.items()),
        *(("out", i if len(outs) > 1 else None, *pair) for i, pair in enumerate(outs)),
    ]
    borders = (
        Border(s, i, _checked(a, f"{s}put_layouts", place), _checked(b, f"desired_{s}put_layouts", place))
        for s, i, a, b in said
    )
    return tuple(border for border in borders if border.declared is not None)


def _one(style: ParallelStyle, option: str, place: str) -> Placement:
    """The single layout of an option."""
    layout = _single(getattr(style, option))
    if isinstance(layout, (tuple, list)):
        raise PlanError(
            f"{place}: {option} of {type(style).__name__} has {len(layout)} layouts for 1 tensor",
            help="give one placement; PrepareModuleInput takes a layout for each input",
        )
    checked = _checked(layout, option, place)
    assert checked is not None
    return checked


def _checked(layout: object, option: str, place: str) -> Placement | None:
    if layout is None or isinstance(layout, PLACEMENTS):
        return layout
    raise PlanError(
        f"{place}: {option} holds {shown(layout)}",
        help="a layout is a torch placement: Shard(dim), Replicate() or Partial()",
    )
