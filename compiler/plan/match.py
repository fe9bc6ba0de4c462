"""Patterns over FQNs: what a key names, and the nearest name to a key that names nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn

WILD = frozenset("*?[")


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
    return {name: [k for k in found if not WILD & set(k)] or found for name, found in out.items()}


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


class Names:
    """Every module, parameter and buffer of a model, under every name it has.

    A shared module, and a tied parameter, has several names; the first one met is its canonical one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = {**self.parameters, **self.buffers}
        self._of: dict[int, list[str]] = {}
        for name, value in [*self.modules.items(), *self.tensors.items()]:
            self._of.setdefault(id(value), []).append(name)
        self._first = {name: names[0] for names in self._of.values() for name in names}

    def first(self, name: str) -> str:
        """The canonical name of a module, parameter or buffer."""
        return self._first[name]

    def of(self, value: object) -> list[str]:
        """All names of a module, parameter or buffer, its canonical one first; none for what is not in the model."""
        return self._of.get(id(value), [])

    def owned(self, module: str) -> dict[str, nn.Parameter]:
        """A module's own parameters by their names in it."""
        return dict(self.modules[module].named_parameters(recurse=False, remove_duplicate=False))

    def around(self, tensor: str) -> Iterator[tuple[str, str]]:
        """The modules that hold a tensor under this name, innermost first, each with its name in there."""
        parts = tensor.split(".")
        for n in range(len(parts) - 1, -1, -1):
            yield self.first(".".join(parts[:n])), ".".join(parts[n:])


def join(prefix: str, name: str) -> str:
    """`prefix.name`, where either may be empty."""
    return ".".join(part for part in (prefix, name) if part)
