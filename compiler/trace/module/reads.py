"""What tracing read beside tensors, and whether it is still so: attributes, containers, functions, hooks, globals.

    reads = Reads(of_guards(guards, root, call))   or, where nobody told what was read, Reads(of_all(module))
    reads.hold()                                   asked in every call: a few comparisons by identity

Dynamo names what it looked at as expressions (`L['self']._modules['fc'].scale`). Where each leads is found once, as
places: a key of a dict, list or object, and what lay there. Only where a place holds another object are the
expressions followed again, and what they lead to compared by value.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from operator import is_, itemgetter
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from shardc.compiler.trace.module.attributes import DEPTH, DERIVED, PLAIN, inner_of, is_recomputed
from shardc.compiler.trace.module.stored import entries, entry, is_as_built_in, reader
from shardc.compiler.trace.torch_internals import GLOBAL_HOOKS, guards_of, is_users_hook
from shardc.compiler.user_code import is_users

log = logging.getLogger(__name__)
TABLES = ("_parameters", "_buffers", "_modules")  # which the compiled module looks after
HOOKS = re.compile(r"_hooks\w*$")
NOT_THE_USERS = re.compile(r"G\['__(import_torch|import_shardc_dot_compiler|builtins_dict)")
GONE = (AttributeError, KeyError, IndexError, TypeError)
CONSTANT = (*PLAIN, Enum, torch.layout, torch.memory_format)


@dataclass
class Survey:
    """What was read, described by name, and the places that were looked at on the way to it."""

    found: dict[str, Any] = field(default_factory=dict)
    items: dict[tuple[int, Any], tuple[Any, Any, Any]] = field(default_factory=dict)  # (table, key, what is there)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)  # the same, of what is in no dict
    absent: dict[tuple[int, Any], tuple[Any, Any]] = field(default_factory=dict)
    sized: dict[int, tuple[Any, int]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # what is described by its id, which must stay its own
    pinned: frozenset[int] = frozenset()  # ids of containers that none of equal content can stand for
    met: list[tuple[str, Any]] = field(default_factory=list)  # what each expression led to

    def item(self, table: Any, key: Any) -> Any:
        value = entry(table, key)
        self.items[id(table), key] = table, key, value
        return value

    def attribute(self, owner: Any, name: str) -> Any:
        """Read as `getattr` does: from the object itself, or its class."""
        own = getattr(owner, "__dict__", {})
        if name in own:
            return self.item(own, name)
        value = getattr(owner, name)
        held = next((vars(c) for c in type(owner).__mro__ if name in vars(c)), None)
        if held is None or hasattr(held[name], "__set__"):  # a slot, a cell, what a property makes
            self.attributes.append((owner, name, value))
        else:
            self.lacks(own, name)
            self.item(held, name)
        return value

    def lacks(self, table: Any, key: Any) -> None:
        self.absent[id(table), key] = table, key

    def describe(self, value: Any, depth: int) -> Any:
        """A value as what can be compared. depth: how far into containers and objects to look."""
        found = self._described(value, depth)
        return (id(value), found) if id(value) in self.pinned else found

    def _described(self, value: Any, depth: int) -> Any:
        if isinstance(value, CONSTANT):
            return type(value), value
        if isinstance(value, MappingProxyType):
            return MappingProxyType  # made anew at each look at a class; what was read in it stands for itself
        if isinstance(value, tuple):
            return type(value), *(self.describe(x, depth) for x in value)
        self.kept.append(value)
        if isinstance(value, MethodType):
            return self.describe(value.__func__, depth), id(value.__self__)
        if isinstance(value, FunctionType):
            return "function", id(value if depth else value.__code__)
        held = None if isinstance(value, nn.Module) else inner_of(value)
        if held is None:
            return "object", id(value)
        if held is value:
            self.sized[id(value)] = value, len(value)  # pyright: ignore
        elif not depth:
            return type(value)
        stored = entries(held)
        if isinstance(stored, set):
            return type(value), frozenset(map(id, stored))
        keys = list(stored) if isinstance(stored, dict) else range(len(stored))
        inner = tuple(self.describe(self.item(held, k), depth - 1) for k in keys) if depth else ()
        return type(value), tuple(keys), inner


Look = Callable[[Survey], None]


class Reads:
    """What one trace read. Kept alive with it are the objects read, so that another is never taken for one of them."""

    def __init__(self, look: Look, pinned: Iterable[Any] = ()) -> None:
        self._look, self._pinned = look, [*pinned]
        self._kept = self._take(self._survey())
        self._found = self._kept.found

    def hold(self) -> bool:
        """Whether all of it is as it was when tracing."""
        if self._unmoved():
            return True
        now = self._survey()
        if now.found != self._found:
            return False
        self._take(now)
        return True

    def changed(self) -> list[str]:
        """What is another now, in the user's words."""
        now = self._survey()
        names = [n for n in {**self._found, **now.found} if self._found.get(n) != now.found.get(n)]
        return list(dict.fromkeys(_shown(name) for name in names))

    def _survey(self) -> Survey:
        survey = Survey(pinned=frozenset(map(id, self._pinned)))
        self._look(survey)
        return survey

    def _take(self, survey: Survey) -> Survey:
        tables: dict[int, tuple[Any, list[Any]]] = {}
        for table, key, _ in survey.items.values():
            tables.setdefault(id(table), (table, []))[1].append(key)
        several = [(table, keys) for table, keys in tables.values() if len(keys) > 1 and is_as_built_in(table)]
        alone = [(table, keys) for table, keys in tables.values() if len(keys) == 1 or not is_as_built_in(table)]
        self._tables = [(itemgetter(*keys), table) for table, keys in several]
        self._items = [(reader(table), key) for table, keys in alone for key in keys]
        self._attributes = [(owner, name) for owner, name, _ in survey.attributes]
        self._values = [table[key] for table, keys in several for key in keys]
        self._values += [read(key) for read, key in self._items] + [value for *_, value in survey.attributes]
        self._absent = list(survey.absent.values())
        self._sized = [container for container, _ in survey.sized.values()]
        self._sizes = [size for _, size in survey.sized.values()]
        return survey

    def _unmoved(self) -> bool:
        """Whether every place holds the very same object. This is asked in every call."""
        try:
            one_by_one = [read(key) for read, key in self._items]
            one_by_one += [getattr(owner, name) for owner, name in self._attributes]
            now = chain(chain.from_iterable([get(table) for get, table in self._tables]), one_by_one)
        except GONE:
            return False
        if not all(map(is_, now, self._values)) or [*map(len, self._sized)] != self._sizes:
            return False
        return not any([key in table for table, key in self._absent])


def reads_of(module: nn.Module, look: Look | None, sets: Iterable[str], foreign: Iterable[Any]) -> Reads:
    """look: at what Dynamo says was read, if it was Dynamo that traced. sets: FQNs of what forward itself sets.
    foreign: the containers that it changes by what they are."""
    return Reads(look, foreign) if look is not None else Reads(of_all(module, sets))


def of_all(module: nn.Module, but: Iterable[str] = ()) -> Look:
    """Whatever the modules hold, for a trace that does not tell what it read. but: FQNs of what forward itself sets."""
    apart = set(but)

    def look(survey: Survey) -> None:
        for fqn, owner in module.named_modules():
            _classes(owner, survey)
            table = vars(owner)
            survey.sized[id(table)] = table, len(table)
            for name in [n for n in table if n not in (*TABLES, *DERIVED, "training") and not is_recomputed(owner, n)]:
                full = f"{fqn}.{name}" if fqn else name
                if full not in apart:
                    survey.found[full] = survey.describe(survey.item(table, name), DEPTH)
        _hooks_of_all(survey)

    return look


def of_guards(captured: Any, root: nn.Module, call: Any) -> Look | None:
    """What Dynamo guards on, the arguments' tensors and what is torch's own apart. root: what it captured, around the
    module; call: (args, kwargs). None where it cannot be told."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: None, call)
    names = {"L": {"self": root, "args": args, "kwargs": kwargs}, "G": type(root).forward.__globals__}
    told = sorted(guards_of(captured), key=str)
    try:
        parsed = [(ast.parse(name, mode="eval").body, name, attr) for name, attr in told if _counts(name)]
        wanted = [read for read in parsed if _is_there(*read[:2], names)]
    except (*GONE, SyntaxError, NameError) as error:
        log.info("every attribute counts as read, as where Dynamo read cannot be found: %r", error)
        return None

    def look(survey: Survey) -> None:
        known: dict[str, Any] = {}
        for tree, name, attr in wanted:
            try:
                value = _follow(tree, names, survey, known)
            except GONE:
                survey.found[name] = GONE
                continue
            survey.met.append((_shown(name), value))
            if attr is not None:
                table = getattr(value, "__dict__", {})
                survey.found[f"{name}.{attr}"] = attr in table, hasattr(value, attr)
                survey.item(table, attr) if attr in table else survey.lacks(table, attr)
            else:
                survey.found[name] = survey.describe(value, 1 if HOOKS.search(name) else 0)
        for owner in root.modules():
            _classes(owner, survey)
        _hooks_of_all(survey)

    return look


def _hooks_of_all(survey: Survey) -> None:
    """The user's hooks of every module, which are in the program, as are those of one module."""
    found = []
    for hooks in GLOBAL_HOOKS:
        survey.sized[id(hooks)] = hooks, len(hooks)
        found += [survey.item(hooks, key) for key in hooks if is_users_hook(hooks[key])]
    survey.kept += found
    survey.found["hooks of all modules"] = tuple(map(id, found))


def _classes(owner: nn.Module, survey: Survey) -> None:
    """Forward itself may be put into a class later."""
    if not isinstance(owner, torch.jit.ScriptModule):  # whose class makes up its forward
        survey.found[f"{type(owner).__qualname__}.forward"] = id(survey.attribute(type(owner), "forward"))


def _is_there(tree: ast.expr, name: str, names: Mapping[str, Any]) -> bool:
    """False for what there was while tracing alone: hooks at the borders of modules, and tensors that were passed.
    Raises what following the name raises, where it is something else."""
    try:
        _follow(tree, names, Survey(), {})
    except GONE:
        if "_hooks" not in name and not re.match(r"L\['(args|kwargs)'\]", name):
            raise
        return False
    return True


def _counts(name: str) -> bool:
    """Whether a name leads to what may change: not torch's own, nor what the compiled module looks after."""
    if HOOKS.search(name):
        return "_global_" not in name  # see _hooks_of_all
    held = re.search(r"_(parameters|buffers)('\])?\['\w+'\]$|_(parameters|buffers|modules)('\])?$|\.training$", name)
    hook = name.endswith("_hooks))[0]]")
    return not held and not hook and not NOT_THE_USERS.match(name) and not re.match(r"L\['(args|kwargs)'\]$", name)


def _follow(tree: ast.expr, names: Mapping[str, Any], survey: Survey, known: dict[str, Any]) -> Any:
    """The value of an expression, each step noted."""
    text = ast.unparse(tree)
    if text not in known:
        known[text] = _step(tree, names, survey, known)
    return known[text]


def _step(tree: ast.expr, names: Mapping[str, Any], survey: Survey, known: dict[str, Any]) -> Any:
    match tree:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Attribute(value=base, attr="__dict__"):
            return vars(_follow(base, names, survey, known))
        case ast.Attribute(value=base, attr=name):
            return survey.attribute(_follow(base, names, survey, known), name)
        case ast.Call(func=ast.Name(id="dict"), args=[table]):
            return _follow(table, names, survey, known)
        case ast.Call(func=ast.Name(id="type"), args=[owner]):
            return type(_follow(owner, names, survey, known))
        case ast.Subscript(value=base, slice=ast.Constant(value=key)):
            table = _follow(base, names, survey, known)
            return survey.item(table, key) if isinstance(table, (dict, list, MappingProxyType)) else table[key]
    return survey.attribute(_Computed(tree, names), "value")


class _Computed:
    """An expression that is evaluated anew each time."""

    def __init__(self, tree: ast.expr, names: Mapping[str, Any]) -> None:
        self._code, self._names = compile(ast.Expression(tree), "<what was read>", "eval"), dict(names)
        self._last: Any = None

    @property
    def value(self) -> Any:
        """Of equal lists of classes or names, such as a class's bases, the one that was given before."""
        found = eval(self._code, self._names)
        if type(found) is list and all(isinstance(x, (str, type)) for x in found) and found == self._last:
            return self._last
        self._last = found
        return found


def _shown(name: str) -> str:
    """An expression as the user would write it."""
    text = re.sub(r"dict\(type\((.+?)\)(\.__mro__\[\d+\])?\.__dict__\)", r"type(\1)", name)
    text = re.sub(r"^L\['self'\]\._modules\['root'\]\.?|\.?_modules(?=\[)", "", text)
    text = text.replace("L['self']['root']", "self")
    text = re.sub(r"^G\['__import_(\w+)'\]", lambda m: m[1].replace("_dot_", "."), text)
    return re.sub(r"\['(\w+)'\]", r".\1", text).lstrip(".")


def functions_of(module: nn.Module) -> Iterator[FunctionType]:
    """The functions that a call runs, as far as can be told without running it: forwards and hooks."""
    for owner in module.modules():
        tables = [table for name, table in vars(owner).items() if HOOKS.search(name) and isinstance(table, dict)]
        for found in (getattr(type(owner), "forward", None), *(hook for table in tables for hook in table.values())):
            function = inspect.unwrap(getattr(found, "__func__", found)) if callable(found) else None
            if isinstance(function, FunctionType) and is_users(function.__code__.co_filename):
                yield function


def around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of the variables outside of a function that its code names, and that within it."""
    inner = [c for c in function.__code__.co_consts if isinstance(c, CodeType)]
    for code in (function.__code__, *inner):
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, getattr(cell, "cell_contents", None)


def mutables(look: Look) -> Iterator[tuple[str, Any, list[Any] | None]]:
    """(name, a container or object that was looked at, or a Python module and which of its names)."""
    survey, globals_ = Survey(), dict[int, tuple[str, Any, list[Any]]]()
    look(survey)
    for name, value in survey.met:
        if isinstance(value, ModuleType):
            keys = [key for table, key, _ in survey.items.values() if table is vars(value)]
            globals_[id(value)] = name, value, keys
        elif not HOOKS.search(name):
            yield name, value, None
    yield from globals_.values()
