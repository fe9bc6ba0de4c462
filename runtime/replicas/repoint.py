"""Values that a module holds, seen from a replica: what points into the source points into the replica.

Besides its registered parameters, buffers and children a module may hold the same objects elsewhere: an RNN
keeps a list of its weights, a model a plain list of layers, a patched `forward` a closure over the old one.
A replica that kept such a value would silently compute with the source's weights.

Followed: lists, tuples, dicts, bound methods, partials, weak references, and the defaults and closure of a
function (its code object is shared). Other objects are shared with the source, as torch does.
"""

import copy
import functools
import weakref
from collections.abc import Iterable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

# From the id of a module or tensor of the source to the replica's own. Ids, because a class may redefine
# equality; whoever holds a Twins keeps the source alive.
Twins = dict[int, Any]

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device})
_CALLABLE = (FunctionType, MethodType, functools.partial, weakref.ref)


class Repoint:
    """One replica's view of the source's values, by call. What needs no change is returned as it is."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins
        self._seen: dict[int, Any] = {}  # one value met twice stays one value

    def __call__(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        key = id(value)
        if key in self._twins:
            return self._twins[key]
        if key not in self._seen:
            self._seen[key] = value  # a value that holds itself ends here
            self._seen[key] = self._repointed(value)
        return self._seen[key]

    def _repointed(self, value: Any) -> Any:
        match value:
            case dict():
                return self._with_items(value, value.items())
            case list():
                return self._with_items(value, enumerate(value))
            case tuple():
                return _tuple_of(value, [self(item) for item in value])
            case MethodType():
                function, owner = self(value.__func__), self._twin(value.__self__)
                same = function is value.__func__ and owner is value.__self__
                return value if same else MethodType(function, owner)
            case functools.partial():
                function, args, kwargs = self(value.func), self(value.args), self(value.keywords)
                same = function is value.func and args is value.args and kwargs is value.keywords
                return value if same else functools.partial(function, *args, **kwargs)
            case weakref.ref():
                target = value()
                twin = self._twin(target)
                return value if twin is target else weakref.ref(twin)
            case FunctionType():
                return self._function(value)
            case _:
                return value

    def _with_items(self, container: Any, items: Iterable[tuple[Any, Any]]) -> Any:
        changed = {key: new for key, item in items if (new := self(item)) is not item}
        if not changed:
            return container
        twin = copy.copy(container)
        for key, item in changed.items():
            twin[key] = item
        return twin

    def _twin(self, value: Any) -> Any:
        return self._twins.get(id(value), value)

    def _function(self, function: FunctionType) -> FunctionType:
        held = function.__defaults__ or ()
        defaults = tuple(map(self._captured, held))
        cells = function.__closure__ or ()
        closure = tuple(map(self._cell, cells))
        if all(a is b for a, b in zip((*defaults, *closure), (*held, *cells), strict=True)):
            return function
        twin = FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults or None, closure or None
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(twin, function)
        return twin

    def _cell(self, cell: CellType) -> CellType:
        if id(cell) in self._seen:
            return self._seen[id(cell)]
        try:
            held = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            return cell
        captured = self._captured(held)
        self._seen[id(cell)] = cell if captured is held else CellType(captured)
        return self._seen[id(cell)]

    def _captured(self, value: Any) -> Any:
        # A container in a closure is as a rule a record that the caller reads later: it stays shared.
        return self(value) if isinstance(value, _CALLABLE) else self._twin(value)


def _tuple_of(container: Any, items: list[Any]) -> Any:
    if all(a is b for a, b in zip(container, items, strict=True)):
        return container
    make = getattr(type(container), "_make", type(container))
    return make(items)
