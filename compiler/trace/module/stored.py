"""What a dict, list, set or deque stores, whatever the methods of its class make of that.

A subclass may make something new at each access (a table of activations gives an instance for a stored class), or
enter what is missing when asked. So entries are read and written by the methods of the built-in type.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

KINDS = (OrderedDict, dict, list, deque, set)


def kind_of(held: Any) -> Any:
    """The built-in type behind a container; None for what is none."""
    return next((kind for kind in KINDS if isinstance(held, kind)), None)


def is_as_built_in(held: Any) -> bool:
    """Whether reading it as usual gives what it stores."""
    return kind_of(held) in (None, type(held))


def reader(held: Any) -> Callable[[Any], Any]:
    """Gives what is stored at a key of a dict, or at a place of a list. KeyError, IndexError: nothing is."""
    kind = kind_of(held)
    return held.__getitem__ if kind in (None, type(held)) else partial(kind.__getitem__, held)


def entry(held: Any, key: Any) -> Any:
    return reader(held)(key)


def entries(held: Any) -> Any:
    """A plain dict, set or list of what is stored."""
    kind = kind_of(held)
    stored = kind.__iter__(held)
    if issubclass(kind, dict):
        return {key: kind.__getitem__(held, key) for key in stored}
    return {*stored} if kind is set else [*stored]


def put(held: Any, values: Mapping[Any, Any]) -> None:
    """Store values in a dict."""
    kind = kind_of(held)
    for key, value in values.items():
        kind.__setitem__(held, key, value)


def refill(held: Any, values: Mapping[Any, Any] | Iterable[Any]) -> None:
    """Store these and nothing else."""
    kind = kind_of(held)
    kind.clear(held)
    if isinstance(values, Mapping):
        put(held, values)
    elif kind is set:
        set.update(held, values)
    else:
        kind.extend(held, values)
