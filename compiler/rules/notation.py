"""Writes lines of factor notation for rules that depend on shapes or arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardc.compiler.rules.table import OpRule, parse

Shape = Sequence[int]


def dims(rank: int, special: Mapping[int, str] | None = None) -> list[str]:
    """`d0 d1 d2`, with some dims, negative ones counted from the end, named otherwise."""
    out = [f"d{i}" for i in range(rank)]
    for at, name in (special or {}).items():
        out[at] = name
    return out


def without(names: Sequence[str], *at: int) -> list[str]:
    """The names but those at some dims."""
    gone = {i % len(names) for i in at} if names else set()
    return [n for i, n in enumerate(names) if i not in gone]


def inserted(names: Sequence[str], at: int, name: str) -> list[str]:
    """The names with one more before dim `at`; -1 puts it last."""
    at %= len(names) + 1
    return [*names[:at], name, *names[at:]]


def line(operands: Sequence[Sequence[str]], results: Sequence[Sequence[str]]) -> str:
    """`d0 d1, d1 -> d0`: one list of dim names per tensor."""
    return f"{_side(operands)} -> {_side(results)}"


def _side(tensors: Sequence[Sequence[str]]) -> str:
    return ", ".join(" ".join(t) or "_" for t in tensors)


def broadcast(shape: Shape, result: Shape, names: Sequence[str]) -> list[str]:
    """An operand's dims, in names of the result's: right-aligned, `1` where it is stretched."""
    skipped = len(result) - len(shape)
    pairs = zip(shape, result[skipped:], names[skipped:], strict=True)
    return [name if n == size else "1" for n, size, name in pairs]


def apart(operands: Sequence[Any], results: Sequence[Any], **options: Any) -> OpRule:
    """The rule of a call that must see its operands whole: every dim a name of its own."""
    left, right = (
        [[f"{side}{i}.{d}" for d in range(t.dim())] for i, t in enumerate(tensors)]
        for side, tensors in (("x", operands), ("y", results))
    )
    whole = [name for tensor in (*left, *right) for name in tensor]
    return parse(line(left, right), whole=" ".join(whole), **options)
