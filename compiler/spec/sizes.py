"""Sizes and numbers that data decides: `u0` in `i64[u0, 2]`, the rows that `torch.nonzero` finds.

What has such a size lies whole on every rank (docs/data_dependent.md), so nobody computes with it before the program
runs. Where bytes are counted it stands for the most it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class DataSize(int):
    """A size known only when the program runs: as an int the most it can be, or 1 where nothing bounds it. It is
    equal to no number, and to another such size of the same name."""

    name: str
    bounded: bool

    def __new__(cls, name: str, bound: int | None) -> DataSize:
        size = super().__new__(cls, 1 if bound is None else bound)
        size.name, size.bounded = name, bound is not None
        return size

    def __getnewargs__(self) -> tuple[str, int | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.name, int(self) if self.bounded else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataSize) and other.name == self.name

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


@dataclass(frozen=True)
class Number:
    """The value of a call that gives a Python number: its type, and what it is in terms of the sizes."""

    kind: str  # "int", "float", "bool"; "check" for a call that only raises
    text: str

    def __str__(self) -> str:
        return f"{self.kind} {self.text}".rstrip()


def named_shape(x: Any) -> tuple[int, ...]:
    """A fake tensor's shape, with the sizes that data decides under their names."""
    return getattr(x, "named_shape", None) or tuple(x.shape)


def name_shape(x: Any, shape: tuple[int, ...]) -> Any:
    """The fake tensor itself, which from now on has this `named_shape`."""
    if any(isinstance(n, DataSize) for n in shape):
        x.named_shape = shape
    return x


def of_data(shape: tuple[int, ...]) -> bool:
    return any(isinstance(n, DataSize) for n in shape)
