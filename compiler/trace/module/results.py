"""Objects among forward's results, such as a cache of keys and values: taken apart by their attributes.

An object whose whole state is its attributes becomes a node of the results' tree, and every call makes a new one of
the same class. What Python cannot copy so (slots, `__getstate__`, subclasses of list or dict, cycles) stays a leaf,
and is refused by name.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from enum import Enum
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Enum, type)


class Opened:
    """An object's class and attributes in the place of the object."""

    def __init__(self, kind: type, attributes: dict[str, Any]) -> None:
        self.kind, self.attributes = kind, attributes


def opened(result: Any) -> tuple[Any, list[Any]]:
    """(the result with what can be opened opened, those objects)."""
    found: list[Any] = []

    def open_one(leaf: Any, above: tuple[int, ...]) -> Any:
        if id(leaf) in above or not _is_its_attributes(leaf):
            return leaf
        found.append(leaf)
        inside = (*above, id(leaf))
        values = {k: pytree.tree_map(lambda x: open_one(x, inside), v) for k, v in vars(leaf).items()}
        return Opened(type(leaf), values)

    return pytree.tree_map(lambda x: open_one(x, ()), result), found


def _is_its_attributes(leaf: Any) -> bool:
    """Whether an object is its class and `__dict__`, as copy and pickle would have it."""
    if isinstance(leaf, (Tensor, nn.Module, type, FunctionType)) or not hasattr(leaf, "__dict__"):
        return False
    if type(leaf).__module__.partition(".")[0] == "torch":  # such as a number that data decides
        return False
    try:
        make, given, state, *more = (*leaf.__reduce_ex__(2), None, None, None)[:5]
    except TypeError:  # it cannot be copied
        return False
    plain = make is copyreg.__newobj__ and given == (type(leaf),)  # pyright: ignore[reportAttributeAccessIssue]
    return plain and not any(more) and (state is None or state is vars(leaf))


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    made = object.__new__(kind)
    vars(made).update(zip(names, values, strict=True))
    return made


def _parts(x: Opened) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    return [*x.attributes.values()], (x.kind, tuple(x.attributes))


def _parts_by_name(x: Opened) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    values, context = _parts(x)
    return [(pytree.GetAttrKey(k), v) for k, v in zip(x.attributes, values, strict=True)], context


# Without a name to write it by, so that no saved program says which class to make.
pytree.register_pytree_node(Opened, _parts, _closed, flatten_with_keys_fn=_parts_by_name)
