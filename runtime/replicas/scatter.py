"""Nested inputs cut into one part per device along dim 0, and the parts' outputs joined again.

Lists, tuples, named tuples, dicts and dataclasses are walked. A tensor is cut as `torch.chunk` cuts it.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from shardc.runtime.replicas.devices import move


def scatter(value: Any, devices: Sequence[torch.device]) -> list[Any]:
    """The value's part for each device, with its structure; fewer parts than devices where rows are fewer.

    0-d tensors go to every device, and so does whatever is neither tensor nor container, as the same object.
    Raises ValueError where two tensors are cut into different numbers of parts, as rows would be lost.
    """
    counts: dict[int, int] = {}  # number of parts -> rows of the first tensor that asks for it
    _count_parts(value, len(devices), counts)
    if len(counts) > 1:
        told = " and ".join(f"one of {rows} rows into {parts}" for parts, rows in counts.items())
        raise ValueError(f"over {len(devices)} devices the inputs are cut into different numbers: {told}")
    parts = next(iter(counts), len(devices))
    return [_part(value, i, len(devices), devices[i]) for i in range(parts)]


def gather(outputs: Sequence[Any], device: torch.device) -> Any:
    """The outputs of all parts as one, on the device: tensors joined along dim 0, 0-d ones to a vector.

    A value that is no tensor must be the same in all outputs. Raises ValueError where outputs differ in
    structure or in such a value, TypeError for a type that cannot be joined.
    """
    first = outputs[0]
    if isinstance(first, Tensor) and all(isinstance(output, Tensor) for output in outputs):
        moved = [move(output, device) for output in outputs]
        return torch.stack(moved) if all(output.dim() == 0 for output in moved) else torch.cat(moved)
    if any(type(output) is not type(first) for output in outputs):
        kinds = ", ".join(type(output).__name__ for output in outputs)
        raise ValueError(f"cannot gather outputs of different types: {kinds}")
    children = [_children(output) for output in outputs]
    if children[0] is None:
        return _agreed(outputs)
    if any(some is None or some.keys() != children[0].keys() for some in children):
        shown = "; ".join(str(list(some or ())) for some in children)
        raise ValueError(f"cannot gather outputs of type {type(first).__name__} with different keys: {shown}")
    parts = {key: gather([some[key] for some in children if some], device) for key in children[0]}
    return _like(first, parts)


def _count_parts(value: Any, devices: int, counts: dict[int, int]) -> None:
    if isinstance(value, PackedSequence):
        raise TypeError("cannot scatter a PackedSequence: its rows are time steps; pack inside forward")
    if isinstance(value, Tensor) and value.dim() > 0:
        rows = value.shape[0]
        counts.setdefault(-(-rows // _step(rows, devices)) if rows else devices, rows)
    for child in (_children(value) or {}).values():
        _count_parts(child, devices, counts)


def _step(rows: int, devices: int) -> int:
    return -(-rows // devices)


def _part(value: Any, index: int, devices: int, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return move(_rows(value, index, devices) if value.dim() > 0 else value, device)
    children = _children(value)
    if children is None:
        return value
    return _like(value, {key: _part(child, index, devices, device) for key, child in children.items()})


def _rows(tensor: Tensor, index: int, devices: int) -> Tensor:
    rows = tensor.shape[0]
    step = _step(rows, devices)
    # narrow and not chunk: a layer that works in place may write to one view, not to one of several
    return tensor.narrow(0, index * step, min(step, rows - index * step))


def _children(value: Any) -> dict[Any, Any] | None:
    """The members of a container by key; None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _like(container: Any, children: dict[Any, Any]) -> Any:
    """A container of the same type around new members."""
    if isinstance(container, tuple | list):
        make = getattr(type(container), "_make", type(container))
        return make(list(children.values()))
    twin = copy.copy(container)  # keeps a default factory, and a dict class that takes other arguments
    for key, child in children.items():
        if isinstance(container, dict):
            twin[key] = child
        else:
            object.__setattr__(twin, key, child)  # the dataclass may be frozen
    return twin


def _agreed(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if first is None:
        return None
    if not isinstance(first, bool | int | float | complex | str | bytes):
        raise TypeError(
            f"cannot gather outputs of type {type(first).__name__}: "
            "return tensors, or lists, tuples, dicts and dataclasses of them"
        )
    if any(output != first and output == output for output in outputs):
        raise ValueError(
            f"cannot gather {', '.join(map(repr, outputs))}: a plain value must be the same in all replicas; "
            "return it as a tensor, which is joined along dim 0"
        )
    return first
