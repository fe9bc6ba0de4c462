"""The rule table: an operator's meaning in factors, one line each.

    rule(aten.mm.default, "m k, k n -> m n", sum="k", linear="0 | 1")

Equal names are equal dims and split together. `sum=` (`max=`, `min=`, `prod=`) names are contracted:
splitting one leaves a result that lacks it pending. `whole=` names must not be split; `plain=` names
may be split only in one plain run (the localize function needs its start), `lone=` names over one mesh
dim only, `nonempty=` names only where no rank comes out empty. `joined=` names are contracted too, but the
localize function itself combines the pieces: a result that lacks one is complete on every rank. `linear=`
says through which operands a pending sum may pass: "0 | 1" either of them, "0 1" both together. `once=` operands
are added to what is summed up: one rank alone has them where a `sum=` name is split, the others zeros. `(a b)` is
one dim made of two factors, `1` a dim of size one, `...` all leading dims, `*` as a whole operand list
repeats the operand before it for every further tensor. `follows={"y": "x"}` says that y, of another size
than x, is split in plain pieces over the mesh dim that splits x, as rows of an image after a convolution
are; both are `plain=` and `lone=`, and the localize function fetches what a piece of one needs of the other.

An operator whose rule depends on its arguments gets a function instead, called with the operator's
own arguments (fake tensors) and `results=` (the fake result tensors), which returns `parse(...)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

Names = tuple[str, ...]  # the factors of one dim, major to minor; none for a dim of size one
Localize = Callable[[Any], Any]

TABLE: dict[Any, Callable[..., OpRule]] = {}
REDUCTIONS = ("sum", "max", "min", "prod")


class RuleError(ValueError):
    """A rule that contradicts itself or does not fit the operator's shapes."""


@dataclass(frozen=True)
class OpRule:
    """An operator call in factors: the dims of each tensor operand and result."""

    operands: tuple[tuple[Names, ...], ...]
    results: tuple[tuple[Names, ...], ...]
    reductions: tuple[tuple[str, str], ...] = ()  # (factor, "sum" | "max" | ...)
    whole: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()
    nonempty: frozenset[str] = frozenset()
    lone: frozenset[str] = frozenset()
    follows: tuple[tuple[str, str], ...] = ()
    linear: tuple[frozenset[int], ...] = ()
    once: frozenset[int] = frozenset()
    sizes: tuple[tuple[str, int], ...] = ()
    shape_arg: int | None = None  # which argument is the first result's shape
    localize: Localize | None = None
    text: str = ""

    _size: dict[str, int] = field(init=False, repr=False, compare=False)
    _leader: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_size", dict(self.sizes))
        object.__setattr__(self, "_leader", dict(self.follows))

    def size(self, factor: str) -> int:
        return self._size[factor]

    def leader(self, factor: str) -> str:
        """The factor that this one is split with: itself, or the one it follows."""
        return self._leader.get(factor, factor)

    def factors(self) -> tuple[str, ...]:
        """All factor names, in order of appearance."""
        tensors = (*self.operands, *self.results)
        return tuple(dict.fromkeys([name for tensor in tensors for dim in tensor for name in dim]))


def parse(
    text: str,
    *,
    sum: str = "",
    max: str = "",
    min: str = "",
    prod: str = "",
    whole: str = "",
    plain: str = "",
    joined: str = "",
    nonempty: str = "",
    lone: str = "",
    follows: Mapping[str, str] | None = None,
    linear: str = "",
    once: str = "",
    sizes: Mapping[str, int] | None = None,
    shape_arg: int | None = None,
    localize: Localize | None = None,
) -> OpRule:
    """The rule a line of factor notation states. Raises RuleError where the line contradicts itself.

    sizes: of factors that the shapes alone do not tell, such as a number of groups.
    """
    read = _read(
        text, sum, max, min, prod, whole, plain, joined, nonempty, lone, tuple((follows or {}).items()), linear, once
    )
    known = tuple((sizes or {}).items())
    return OpRule(*read, sizes=known, shape_arg=shape_arg, localize=localize, text=text.strip())


@lru_cache(1024)
def _read(
    text: str, sum: str, max: str, min: str, prod: str, whole: str, plain: str, joined: str, nonempty: str, lone: str,
    follows: tuple[tuple[str, str], ...], linear: str, once: str,
) -> tuple:  # fmt: skip
    """What a line alone says: the first fields of its rule. Functions write the same few lines again and again."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"{text!r}: a rule reads 'operands -> results'")
    contracted = {"sum": sum, "max": max, "min": min, "prod": prod}
    reductions = tuple((name, op) for op, names in contracted.items() for name in names.split())
    names = (_names(words) for words in (whole, plain, joined, nonempty, lone))
    out: tuple[Any, ...] = (
        _tensors(left),
        _tensors(right),
        reductions,
        *names,
        follows,
        _groups(linear),
        _numbers(once),
    )
    _check(OpRule(*out), text)
    return out


def _tensors(side: str) -> tuple[tuple[Names, ...], ...]:
    if not side.strip():
        return ()
    return tuple(tuple(_dims(tensor)) for tensor in side.split(","))


def _dims(tensor: str) -> Iterator[Names]:
    for word in re.findall(r"\([^)]*\)|\S+", tensor):
        if word == "_":  # a tensor without dims
            continue
        names = tuple(word.strip("()").split())
        yield tuple(n for n in names if n != "1")


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _numbers(words: str) -> frozenset[int]:
    return frozenset(int(word) for word in words.split())


def _groups(linear: str) -> tuple[frozenset[int], ...]:
    return tuple(frozenset(int(i) for i in group.split()) for group in linear.split("|") if group.strip())


def _check(rule: OpRule, text: str) -> None:
    read = {name for t in rule.operands for dim in t for name in dim} - {"*"}
    tied = {name for pair in rule.follows for name in pair}
    free = rule.whole | rule.joined | tied | {name for name, _ in rule.reductions}
    for result in rule.results:
        written = {name for dim in result for name in dim}
        lost = sorted(read - written - free - {"..."})
        if lost:
            raise RuleError(f"{text!r}: factors {lost} vanish; name them in sum=, max=, ... or whole=")
    known = read | {name for t in rule.results for dim in t for name in dim} | {"..."}
    unknown = sorted((free | rule.plain | rule.nonempty | rule.lone) - known)
    if unknown:
        raise RuleError(f"{text!r}: {unknown} named in an option but in no operand or result")


def fit(rule: OpRule, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]) -> OpRule:
    """The rule with `...` and `*` spelled out and every factor's size known from the shapes."""
    names = _spread(rule, len(operands))
    sides = [
        tuple([_dots(dims, len(shape)) for dims, shape in zip(names, operands, strict=True)]),
        tuple([_dots(dims, len(shape)) for dims, shape in zip(rule.results, results, strict=False)]),
    ]
    sizes: dict[str, int] = dict(rule.sizes)
    pairs = [
        (dim, int(n))
        for tensors, shapes in zip(sides, (operands, results), strict=True)
        for tensor, shape in zip(tensors, shapes, strict=False)
        for dim, n in zip(tensor, shape, strict=True)
    ]
    pairs.sort(key=lambda p: len(p[0]))
    for dim, n in pairs:
        if len(dim) != 1 or sizes.setdefault(dim[0], n) != n:
            _solve(rule, dim, n, sizes)
    return OpRule(
        sides[0], sides[1], rule.reductions, rule.whole, rule.plain, rule.joined, rule.nonempty, rule.lone,
        rule.follows, rule.linear, rule.once, tuple(sizes.items()), rule.shape_arg, rule.localize, rule.text,
    )  # fmt: skip


def _spread(rule: OpRule, count: int) -> tuple[tuple[Names, ...], ...]:
    if rule.operands and rule.operands[-1] == (("*",),):
        *fixed, last = rule.operands[:-1]
        return (*fixed, *([last] * (count - len(fixed))))
    if len(rule.operands) != count:
        raise RuleError(f"{rule.text!r}: the rule has {len(rule.operands)} operands, the call {count} tensors")
    return rule.operands


def _dots(dims: tuple[Names, ...], rank: int) -> tuple[Names, ...]:
    if ("...",) not in dims:
        if len(dims) != rank:
            raise RuleError(f"{dims} does not fit a tensor of {rank} dims")
        return dims
    at, extra = dims.index(("...",)), rank - len(dims) + 1
    return (*dims[:at], *((f".{i - extra}",) for i in range(extra)), *dims[at + 1 :])


def _solve(rule: OpRule, dim: Names, n: int, sizes: dict[str, int]) -> None:
    known, open_names = 1, [name for name in dim if name not in sizes]
    for name in dim:
        known *= sizes.get(name, 1)
    if len(open_names) == 1 and known and n % known == 0:
        sizes[open_names[0]] = n // known
    elif open_names or known != n:
        raise RuleError(f"{rule.text!r}: dim {dim} has size {n}, but its factors have {sizes}")


def rule(op: Any, text: str | None = None, **options: Any) -> Any:
    """Register an operator's rule: `rule(op, "m k, k n -> m n", sum="k")`, or as a decorator of a function
    that is called with the operator's arguments and returns `parse(...)`.

    op: an OpOverload, an OpOverloadPacket (its default overload), a `torch.library.custom_op`,
        "ns::name" or "ns::name.overload".
    Raises RuleError where the line contradicts itself.
    """
    target = overload(op)
    if text is None:

        def register(fn: Callable[..., OpRule]) -> Callable[..., OpRule]:
            TABLE[target] = fn
            return fn

        return register
    parsed = parse(text, **options)
    TABLE[target] = lambda *args, **kwargs: parsed
    return parsed


def overload(op: Any) -> Any:
    """The OpOverload that traced graphs call for `op`."""
    if isinstance(op, str):
        namespace, _, name = op.partition("::")
        packet, _, which = name.partition(".")
        op = getattr(getattr(torch.ops, namespace), packet)
        op = getattr(op, which) if which else op
    op = getattr(op, "_opoverload", op)  # what torch.library.custom_op returns wraps it
    return op.default if hasattr(op, "overloads") else op


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    """The tensor leaves of arguments, in order: an operator's tensor operands."""
    out: list[torch.Tensor] = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            out.append(tree)
        elif isinstance(tree, (list, tuple)):
            out += tensors_in(*tree)
        elif isinstance(tree, Mapping):
            out += tensors_in(*tree.values())
    return out


def rule_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> OpRule | None:
    """The rule of one call, fitted to its shapes; None for an operator without one."""
    build = TABLE.get(op)
    if build is None:
        return None
    made = build(*args, **kwargs, results=tensors_in(results))
    shapes = [tuple(t.shape) for t in tensors_in(args, kwargs)]
    return fit(made, shapes, [tuple(t.shape) for t in tensors_in(results)])
