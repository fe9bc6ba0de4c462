"""What forward sets beside its tensors: attributes, entries of dicts and lists, the module's and those it is given.

While tracing it is seen and put back. Each call of the program then does the same to what is there: an `Effect`.
Looked at are the attributes of every submodule and, a few steps on, what containers and plain objects in them hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from shardc.compiler.errors import ShardingError
from shardc.compiler.trace.module.results import SIMPLE, opened
from shardc.compiler.trace.module.stand_ins import TABLES
from shardc.compiler.trace.module.stored import entries, entry, put, refill
from shardc.compiler.trace.sizes.data_decided import SYMBOLIC

# RNNs keep a list of their own weights, rebuilt whenever it is out of date.
DERIVED = ("_flat_weights", "_flat_weight_refs")
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
OWN = (*TABLES, "_modules")
DEPTH = 3  # containers within containers
CODE = (type, FunctionType, MethodType, ModuleType)
Find = Callable[[Any], Any]  # of a call, (args, kwargs), a container as it is then


@dataclass(frozen=True)
class Effect:
    """What each call does to one container. spec: of the new values among the program's results.

    keys: of a dict those that are set; of a list what becomes of it, by place in the old one, None for a new value.
    """

    name: str
    find: Find
    keys: tuple[Any, ...]
    gone: tuple[Any, ...]
    spec: pytree.TreeSpec

    def apply(self, call: Any, leaves: Sequence[Any]) -> None:
        container, values = self.find(call), iter(self.spec.unflatten(leaves))
        if isinstance(container, dict):
            for key in self.gone:
                container.pop(key, None)
            put(container, dict(zip(self.keys, values, strict=True)))
        elif isinstance(container, set):
            refill(container, (entries(container) - {*self.gone}) | {*values})
        else:
            old = entries(container)
            refill(container, [next(values) if place is None else old[place] for place in self.keys])


class Watched:
    """A container, and a shallow copy of what it held. own: which of its keys are looked after elsewhere."""

    def __init__(self, name: str, held: Any, find: Find, named: bool = False, own: Callable[[Any], bool] | None = None):
        self.name, self.held, self.find, self._named, self._own = name, held, find, named, own or (lambda key: False)
        self.before = entries(held)

    def name_of(self, key: Any) -> str:
        return f"{self.name}.{key}".lstrip(".") if self._named else f"{self.name}[{key!r}]"

    def inner(self) -> list[tuple[str, Any, Find]]:
        """Each entry, its name, and how to find it."""
        if isinstance(self.held, set):
            return []
        stored = entries(self.held)
        keyed = stored.items() if isinstance(stored, dict) else enumerate(stored)
        return [(self.name_of(k), v, lambda call, k=k: entry(self.find(call), k)) for k, v in keyed if not self._own(k)]

    def changes(self) -> tuple[tuple[Any, ...], tuple[Any, ...], list[Any]] | None:
        """(keys, gone, new values) as an `Effect` has them; None where nothing changed."""
        now, before = entries(self.held), self.before
        if isinstance(now, dict):
            keys = [k for k in now if not self._own(k) and not (k in before and _same(before[k], now[k]))]
            gone = [k for k in before if k not in now and not self._own(k)]
            return (tuple(keys), tuple(gone), [now[k] for k in keys]) if keys or gone else None
        if isinstance(now, set):
            return ((), tuple(before - now), [*(now - before)]) if now != before else None
        places = {id(value): i for i, value in reversed([*enumerate(before)])}
        keys = [i if i < len(before) and value is before[i] else places.get(id(value)) for i, value in enumerate(now)]
        new = [value for key, value in zip(keys, now, strict=True) if key is None]
        return (tuple(keys), (), new) if keys != [*range(len(before))] else None

    def restore(self) -> None:
        now, before = entries(self.held), self.before
        if isinstance(now, dict):
            if [*now] != [*before]:
                refill(self.held, before)
            else:
                put(self.held, {k: v for k, v in before.items() if now[k] is not v})
        elif now != before if isinstance(now, set) else [*map(id, now)] != [*map(id, before)]:
            refill(self.held, before)


class Attributes:
    """What the submodules hold, and what else is watched, to see what forward changed and to put it back."""

    def __init__(self, module: nn.Module) -> None:
        self._watched: dict[int, Watched] = {}
        self._passed: dict[int, Watched] = {}
        self._tables: list[Watched] = []
        self._foreign: dict[int, Watched] = {}
        for fqn, owner in module.named_modules():
            table = vars(owner)
            tables = [table[name] for name in OWN if isinstance(table.get(name), dict)]
            self._tables += [Watched(fqn, own, _at((), own), True) for own in tables]
            self._watched[id(table)] = Watched(fqn, table, _at((), table), True, partial(_is_own, owner))
        for one in [*self._watched.values()]:
            self._reach(one.inner(), self._watched)

    def watch(self, name: str, value: Any, keys: Collection[Any] | None = None) -> None:
        """Look at one more container or object, which is found by what it is; at these keys alone, if any."""
        held = inner_of(value) if keys is None else vars(value)
        if held is not None and not self._knows(held):
            own = None if keys is None else lambda key: key not in keys
            self._foreign[id(held)] = Watched(name, held, _at((), held), held is not value, own)

    def watch_call(self, call: tuple[Any, Any], name: Callable[[Any], str]) -> None:
        """Look at the containers of this call, (args, kwargs), and at the objects in it."""
        self._passed = {}
        front: list[tuple[Any, ...]] = [(0, i) for i in range(len(call[0]))] + [(1, key) for key in call[1]]
        while front:
            steps = front.pop()
            value = _at(steps)(call)
            if isinstance(value, (list, dict)):
                self._passed.setdefault(id(value), Watched(name(steps), value, _at(steps)))
            if isinstance(value, (list, tuple, dict)):
                front += [(*steps, key) for key in (value if isinstance(value, dict) else range(len(value)))]
            else:
                self._reach([(name(steps), value, _at(steps))], self._passed)

    def _reach(self, front: list[tuple[str, Any, Find]], into: dict[int, Watched]) -> None:
        """Watch what can be reached in a few steps."""
        for _ in range(DEPTH):
            inner: list[tuple[str, Any, Find]] = []
            for name, value, find in front:
                held = inner_of(value)
                if held is not None and not self._knows(held):
                    named = held is not value
                    within = (lambda call, find=find: vars(find(call))) if named else find
                    one = into[id(held)] = Watched(name, held, within, named)
                    inner += one.inner()
            front = inner

    def _knows(self, held: Any) -> bool:
        tables = any(one.held is held for one in self._tables)
        return tables or any(id(held) in known for known in (self._watched, self._passed, self._foreign))

    def effects(self) -> tuple[list[Effect], list[Any], list[str]]:
        """(what forward did, a leaf for each new value in it, what those are called)."""
        effects, leaves, names = [], [], []
        for one in self._all():
            found = one.changes()
            if found is None:
                continue
            keys, gone, values = found
            called = [one.name_of(k) for k in (*keys, *gone)] if isinstance(one.held, dict) else [one.name]
            paths, spec = pytree.tree_flatten_with_path([opened(value)[0] for value in values])
            for path, leaf in paths:
                name = (called[path[0].idx] if isinstance(one.held, dict) else one.name) + pytree.keystr(path[1:])  # pyright: ignore
                _check(name, leaf)
                leaves.append(leaf)
                names.append(name)
            effects.append(Effect(", ".join(called), one.find, keys, gone, spec))
        return effects, leaves, names

    def overwritten(self) -> list[tuple[str, Any]]:
        """(name, value) of what forward puts something else in the place of."""
        dicts = [(one, one.changes()) for one in self._all() if isinstance(one.held, dict)]
        changed = [(one, found[0]) for one, found in dicts if found is not None]
        return [(one.name_of(key), one.before[key]) for one, keys in changed for key in keys if key in one.before]  # pyright: ignore

    def registered(self) -> list[str]:
        """Parameters, buffers and submodules that forward registered."""
        return [one.name_of(key) for one in self._tables for key in one.held if key not in one.before]

    def restore(self) -> None:
        for one in (*self._tables, *self._all()):
            one.restore()

    def foreign(self) -> list[Any]:
        """The containers that forward changed, and that are neither the module's nor an argument's."""
        return [one.held for one in self._foreign.values() if one.changes() is not None]

    def _all(self) -> list[Watched]:
        return [*self._watched.values(), *self._passed.values(), *self._foreign.values()]


def _at(steps: Sequence[Any], start: Any = None) -> Find:
    """Follows keys from a call, or from what is the same in every call."""

    def find(call: Any) -> Any:
        return reduce(entry, steps, call if start is None else start)

    return find


def _check(name: str, leaf: Any) -> None:
    if not isinstance(leaf, (Tensor, *SYMBOLIC, *SIMPLE)):
        raise ShardingError(
            f"forward puts a {type(leaf).__name__} into {name}, which a program cannot make",
            help="put tensors and plain values there, in lists, tuples and dicts, or do it outside of forward",
        )


def _is_own(owner: nn.Module, name: str) -> bool:
    """Whether an attribute is a table of the module, or made anew by it at each call."""
    return name in (*OWN, *DERIVED) or is_recomputed(owner, name)


def inner_of(value: Any) -> Any:
    """The container itself, or the attributes of an object that is nothing else; None for other values."""
    if isinstance(value, (list, dict, set, deque)):
        return value
    if isinstance(value, (Tensor, nn.Module, *PLAIN, *CODE)) or type(value).__module__.partition(".")[0] == "torch":
        return None  # torch's own objects keep what they have looked up
    return getattr(value, "__dict__", None)


def _same(old: Any, now: Any) -> bool:
    return old is now or (isinstance(now, PLAIN) and type(old) is type(now) and old == now)


def is_recomputed(owner: nn.Module, name: str) -> bool:
    """Whether a pre-hook sets it on each call from a parameter (weight_norm, spectral_norm, prune)."""
    return any(f"{name}{suffix}" in owner._parameters for suffix in ("_g", "_orig"))
