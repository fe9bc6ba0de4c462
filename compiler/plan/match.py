"""Patterns over FQNs: what a key names, and the nearest name to a key that names nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

WILD = frozenset("*?[")


@dataclass(frozen=True)
class Unmatched:
    """A pattern that matches none of the names it could have meant; `text` is how the user wrote it."""

    text: str
    pattern: str
    names: Iterable[str]


def is_exact(pattern: str) -> bool:
    """Whether the pattern is a name written out."""
    return not WILD & set(pattern)


def find(pattern: str, names: Iterable[str]) -> list[str]:
    """The names a pattern matches, component by component: `*` never spans a dot, `""` is the root alone."""
    if not pattern:
        return [name for name in names if not name]
    wanted = pattern.split(".")
    split = ((name, name.split(".")) for name in names if name)
    return [n for n, parts in split if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))]


def claims(keys: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """For each name, the keys that match it; a key that writes it out wins over patterns."""
    names, out = list(names), {}
    for key in keys:
        for name in find(key, names):
            out.setdefault(name, []).append(key)
    return {name: [k for k in found if is_exact(k)] or found for name, found in out.items()}


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name most like a key, layer numbers aside; None where there are no names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_numberless(name), []).append(name)
    if not groups:
        return None
    # One comparison per kind of layer, not per layer: difflib is slow and models are deep.
    wanted = _numberless(key)
    kind = max(groups, key=lambda group: difflib.SequenceMatcher(None, wanted, group).ratio())
    return max(groups[kind], key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """A help line with the nearest name, or nothing."""
    found = nearest(key, names)
    return f'the nearest name is "{found}"' if found else ""


def _numberless(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class Index:
    """Every module, parameter and buffer of a model, under every name it has.

    A shared module, and a tied parameter, has several names; the first one met is its canonical one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = {**self.parameters, **self.buffers}
        self._module_names = _firsts(self.modules)
        self._tensor_names = _firsts(self.tensors)
        self._names_of: dict[str, list[str]] = {}
        for name, first in self._tensor_names.items():
            self._names_of.setdefault(first, []).append(name)

    def module(self, name: str) -> str:
        """The canonical name of a module."""
        return self._module_names[name]

    def tensor(self, name: str) -> str:
        """The canonical name of a parameter or buffer."""
        return self._tensor_names[name]

    def names_of(self, tensor: str) -> list[str]:
        """All names of a parameter or buffer, its canonical one first."""
        return self._names_of[tensor]

    def owned(self, module: str) -> dict[str, nn.Parameter]:
        """A module's own parameters by their names in it."""
        return dict(self.modules[module].named_parameters(recurse=False, remove_duplicate=False))

    def ancestors(self, tensor: str) -> list[str]:
        """Canonical names of the modules that hold a tensor under this name, innermost first."""
        parts = tensor.split(".")[:-1]
        return [self.module(".".join(parts[:n])) for n in range(len(parts), -1, -1)]

    def name_of(self, module: nn.Module) -> str | None:
        """The canonical name of a module object, or None where the model does not hold it."""
        return next((self.module(name) for name, m in self.modules.items() if m is module), None)


def _firsts(named: Mapping[str, object]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named.items()}


def join(prefix: str, name: str) -> str:
    """`prefix.name`, where either may be empty."""
    return ".".join(part for part in (prefix, name) if part)
