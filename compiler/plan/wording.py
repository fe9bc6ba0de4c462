"""The values of a plan as they would be written: `RowwiseParallel(output_layouts=Shard(1))`, `Shard(0)`."""

from __future__ import annotations

from collections.abc import Mapping

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.placement_types import _StridedShard


def style_text(value: object) -> str:
    """A style as it would be written, options at their default left out."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, PrepareModuleInputOutput):
        parts = {**_options(value.prepare_module_input), **_options(value.prepare_module_output)}
    else:
        parts = _options(value)
    return f"{type(value).__name__}({', '.join(f'{k}={_option_text(v)}' for k, v in parts.items())})"


def placement_code(placement: Placement) -> str:
    """A placement as it would be written: `Shard(0)`, `Replicate()`, `Partial("max")`."""
    if isinstance(placement, _StridedShard):
        return f"_StridedShard({placement.dim}, split_factor={placement.split_factor})"
    if isinstance(placement, Shard):
        return f"Shard({placement.dim})"
    if isinstance(placement, Partial):
        return "Partial()" if placement.reduce_op == "sum" else f'Partial("{placement.reduce_op}")'
    return "Replicate()"


def same_wish(a: object, b: object) -> bool:
    """Whether two values of a plan wish the same (torch's styles have no equality of their own)."""
    return a is b or (
        type(a) is type(b) and (a == b or (isinstance(a, ParallelStyle) and style_text(a) == style_text(b)))
    )


def _options(style: object) -> dict[str, object]:
    """The options of a style that differ from their default."""
    out: dict[str, object] = {}
    if isinstance(style, SequenceParallel):
        dim = getattr(style.sequence_sharding[0], "dim", 1)
        return {} if dim == 1 else {"sequence_dim": dim}
    usual = {ColwiseParallel: (Replicate(), Shard(-1)), RowwiseParallel: (Shard(-1), Replicate())}
    takes, gives = usual.get(type(style), (None, None))
    names = [("input_layouts", takes), ("output_layouts", gives)]
    if takes is None:
        names[1:1] = [("desired_input_layouts", None)]
        names += [("desired_output_layouts", None), ("input_kwarg_layouts", None)]
        names += [("desired_input_kwarg_layouts", None)]
    for name, default in names:
        value = getattr(style, name, None)
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if value and value != default:
            out[name] = value
    return out


def _option_text(value: object) -> str:
    if isinstance(value, Placement):
        return placement_code(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{k}": {_option_text(v)}' for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_option_text(v) for v in value)})"
    return str(value)


def shown(value: object) -> str:
    """A value in an error message, kept short."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text and " at 0x" not in text else f"a {type(value).__name__}"
