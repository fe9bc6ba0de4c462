"""Attributes that forward sets while it is traced: put back, and reported, as the traced program will not set them.

Seen are those of every submodule and, a few steps on, what lists, dicts, sets and plain objects in them hold.
"""

from __future__ import annotations

from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from shardc.compiler.trace.module.stand_ins import TABLES

# RNNs keep a list of their own weights, rebuilt whenever it is out of date.
DERIVED = ("_flat_weights", "_flat_weight_refs")
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
DEPTH = 3  # containers within containers
CODE = (type, FunctionType, MethodType, ModuleType)


class Attributes:
    """The attributes of all submodules, to see what forward changed and to put it back."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.named_modules())
        self._before = [dict(vars(owner)) for _, owner in self._modules]
        self._contents: dict[int, tuple[Any, Any]] = {}  # by id: each container, and a shallow copy of what it held
        self._within: list[dict[str, list[int]]] = [
            {name: self._look(value) for name, value in attributes.items()} for attributes in self._before
        ]

    def _look(self, value: Any) -> list[int]:
        """The containers that can be reached from a value, itself included."""
        found: dict[int, None] = {}
        front = [value]
        for _ in range(DEPTH):
            front = [v for v in front if inner_of(v) is not None and id(v) not in found]
            for v in front:
                found[id(v)] = None
                self._contents.setdefault(id(v), (v, _copy(v)))
            front = [inner for v in front for inner in _inside(v)]
        return [*found]

    def changed(self) -> list[str]:
        """FQNs of the attributes that forward set, parameters and buffers apart."""
        other = {key for key, (container, content) in self._contents.items() if not _alike(container, content)}
        out = []
        for (fqn, owner), before, within in zip(self._modules, self._before, self._within, strict=True):
            now = vars(owner)
            names = [n for n in now if n not in (*TABLES, *DERIVED)]
            names = [n for n in names if not _same(n, before, now) or not other.isdisjoint(within.get(n, ()))]
            for table in TABLES:
                if isinstance(now.get(table), dict):
                    names += [n for n in now[table] if n not in self._contents[id(before[table])][1]]
            out += [f"{fqn}.{n}" if fqn else n for n in names if not is_recomputed(owner, n)]
        return out

    def restore(self) -> None:
        for (_, owner), before in zip(self._modules, self._before, strict=True):
            for name in [name for name in vars(owner) if name not in before]:
                del vars(owner)[name]
            vars(owner).update(before)
        for container, content in self._contents.values():
            if not _alike(container, content):
                _refill(container, content)


def inner_of(value: Any) -> Any:
    """The container itself, or the attributes of an object that is nothing else; None for other values."""
    if isinstance(value, (list, dict, set)):
        return value
    if isinstance(value, (Tensor, nn.Module, *PLAIN, *CODE)) or type(value).__module__.partition(".")[0] == "torch":
        return None  # torch's own objects keep what they have looked up
    return getattr(value, "__dict__", None)


def _copy(value: Any) -> Any:
    held = inner_of(value)
    return next(kind(held) for kind in (list, dict, set) if isinstance(held, kind))


def _inside(value: Any) -> list[Any]:
    held = inner_of(value)
    return list(held.values()) if isinstance(held, dict) else list(held)


def _same(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    if name not in before:
        return False
    old, value = before[name], now[name]
    return old is value or (isinstance(value, PLAIN) and type(old) is type(value) and old == value)


def _alike(container: Any, content: Any) -> bool:
    """Whether a container still holds the same objects in the same order."""
    held = inner_of(container)
    if len(held) != len(content):
        return False
    if isinstance(held, set):
        return {id(v) for v in held} == {id(v) for v in content}
    if isinstance(held, dict):
        return all(a is b and held[a] is content[b] for a, b in zip(held, content, strict=True))
    return all(a is b for a, b in zip(held, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    held = inner_of(container)
    held.clear()
    held.extend(content) if isinstance(held, list) else held.update(content)


def is_recomputed(owner: nn.Module, name: str) -> bool:
    """Whether a pre-hook sets it on each call from a parameter (weight_norm, spectral_norm, prune)."""
    return any(f"{name}{suffix}" in owner._parameters for suffix in ("_g", "_orig"))
