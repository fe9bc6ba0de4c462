"""What torch's parallel styles and the strings of Hugging Face's `tp_plan` wish, read into one form.

`use_local_output` and `use_local_input` are accepted and say nothing here: there are no local tensors
in a global view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
from torch.distributed.tensor.placement_types import _StridedShard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.match import nearest
from shardc.compiler.plan.wording import shown

STYLES = (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    PrepareModuleInputOutput,
)
PLACEMENTS = (Shard, Replicate, Partial, _StridedShard)


@dataclass(frozen=True)
class Port:
    """What a style says about a tensor at a module's border; the fields are those of `Boundary`."""

    side: Literal["in", "out"]
    index: int | str | None
    declared: Placement | None
    desired: Placement | None
    open: bool = False
    explicit: bool = True


@dataclass(frozen=True)
class Style:
    """A style in one form.

    `split` is what becomes of the parameters: "columns", "rows", "whole", or "" where nothing is said.
    `takes` and `gives` are layouts at the border that differ from the style's default. `counts` are the
    lengths of its lists of layouts. `named` is set for strings, which may also name a parameter;
    `table` for those made for lookup tables.
    """

    split: Literal["columns", "rows", "whole", ""] = ""
    takes: Placement | None = None
    gives: Placement | None = None
    ports: tuple[Port, ...] = ()
    counts: tuple[tuple[Literal["in", "out"], int], ...] = ()
    named: bool = False
    table: bool = False


_WHOLE_OUTPUT = (Port("out", None, None, Replicate()),)


def _along(dim: int) -> tuple[Port, ...]:
    # Never explicit: a root input is not taken for a slice because a norm works on slices.
    here = Shard(dim)
    return (Port("in", 0, here, here, True, False), Port("out", None, None, here, True, False))


STRINGS: dict[str, Style] = {
    "colwise": Style("columns"),
    "colwise_rep": Style("columns", gives=Replicate()),
    "colwise_gather_output": Style("columns", gives=Replicate()),
    "rowwise": Style("rows"),
    "rowwise_rep": Style("rows", takes=Replicate()),
    "rowwise_split_input": Style("rows", takes=Replicate()),
    # Fused gate and up: which factor of the dim is split is open, so their halves can stay together.
    "packed_colwise": Style("columns"),
    "packed_rowwise": Style("rows"),
    "embedding_rowwise": Style("rows", table=True),
    "embedding_colwise": Style("columns", gives=Replicate(), table=True),
    "sequence_parallel": Style("whole", ports=_along(1)),
    "replicate": Style("whole"),
    # Both say which gradients a rank sees only a part of; in a global view no gradient is a part.
    "replicated_with_grad_allreduce": Style("whole"),
    "mla_kv_a_proj": Style("whole"),
    "all_reduce": Style(ports=_WHOLE_OUTPUT),
    "moe_tp_experts": Style(ports=_WHOLE_OUTPUT),
    # It undoes a sum over ranks that a global view never makes.
    "moe_identity_expert": Style(),
    "local_params": Style(),
}
REFUSED_STRINGS = ("grouped_gemm", "ep_router", "ep_dispatch_experts", "megamoe_router", "megamoe_experts")


def is_style(value: object) -> bool:
    """Whether a value is meant as a style."""
    return isinstance(value, (ParallelStyle, str))


def read_style(value: object, place: str) -> Style:
    """The one form of a style object or string; `place` says where it stands in the plan.

    Raises PlanError for an unknown style, an unknown or unsupported string, and a layout that is none.
    """
    if isinstance(value, str):
        return _read_string(value, place)
    if type(value) not in STYLES:  # a subclass may override what is read here
        raise _no_style(value, place)
    if isinstance(value, (ColwiseParallel, RowwiseParallel)):
        rows = isinstance(value, RowwiseParallel)
        takes = _one(value.input_layouts, "input_layouts", value, place)
        gives = _one(value.output_layouts, "output_layouts", value, place)
        usual = (Shard(-1), Replicate()) if rows else (Replicate(), Shard(-1))
        return Style(
            "rows" if rows else "columns",
            takes=None if takes == usual[0] else takes,
            gives=None if gives == usual[1] else gives,
        )
    if isinstance(value, SequenceParallel):
        along = _one(value.sequence_sharding, "sequence_dim", value, place)
        assert isinstance(along, Shard)
        return Style("whole", ports=_along(along.dim))
    assert isinstance(value, (PrepareModuleInput, PrepareModuleOutput, PrepareModuleInputOutput))
    return _read_prepare(value, place)


def _read_string(value: str, place: str) -> Style:
    if value in STRINGS:
        style = STRINGS[value]
        return Style(style.split, style.takes, style.gives, style.ports, (), True, style.table)
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


def _read_prepare(value: PrepareModuleInput | PrepareModuleOutput | PrepareModuleInputOutput, place: str) -> Style:
    takes = value.prepare_module_input if isinstance(value, PrepareModuleInputOutput) else value
    gives = value.prepare_module_output if isinstance(value, PrepareModuleInputOutput) else value
    ports: list[Port] = []
    counts: list[tuple[Literal["in", "out"], int]] = []
    if isinstance(takes, PrepareModuleInput):
        ports += _input_ports(takes, place)
        if takes.input_layouts is not None:
            counts.append(("in", len(takes.input_layouts)))
    if isinstance(gives, PrepareModuleOutput):
        ports += _output_ports(gives, place)
        counts.append(("out", len(gives.output_layouts)))
    return Style(ports=tuple(ports), counts=tuple(counts))


def _input_ports(style: PrepareModuleInput, place: str) -> list[Port]:
    listed = zip(style.input_layouts or (), style.desired_input_layouts or (), strict=False)
    pairs: list[tuple[int | str, object, object]] = [(i, a, b) for i, (a, b) in enumerate(listed)]
    unknown = sorted(set(style.desired_input_kwarg_layouts) - set(style.input_kwarg_layouts))
    if unknown:
        raise PlanError(
            f"{place}: desired_input_kwarg_layouts names {unknown[0]}, which input_kwarg_layouts does not",
            help="give both dicts the same names",
        )
    for name, layout in style.input_kwarg_layouts.items():
        pairs.append((name, layout, style.desired_input_kwarg_layouts.get(name)))
    ports = [
        Port("in", i, _checked(a, "input_layouts", place), _checked(b, "desired_input_layouts", place))
        for i, a, b in pairs
    ]
    return [port for port in ports if port.declared is not None]


def _output_ports(style: PrepareModuleOutput, place: str) -> list[Port]:
    several = len(style.output_layouts) > 1
    pairs = zip(style.output_layouts, style.desired_output_layouts, strict=True)
    ports = [
        Port(
            "out",
            i if several else None,
            _checked(a, "output_layouts", place),
            _checked(b, "desired_output_layouts", place),
        )
        for i, (a, b) in enumerate(pairs)
    ]
    return [port for port in ports if port.declared is not None]


def _one(layouts: Sequence[object], option: str, style: ParallelStyle, place: str) -> Placement:
    """The single layout of an option; torch wraps whatever it is given in a tuple of one."""
    (layout,) = layouts if len(layouts) == 1 else (tuple(layouts),)
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
