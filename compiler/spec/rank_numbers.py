"""Numbers that differ between ranks, written as what they are: `10@tp`, bound when a program is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardc.compiler.spec.mesh import Mesh, place
from shardc.compiler.spec.spec import Dim, axes_of, chunk, dim_text


@dataclass(frozen=True)
class Local:
    """`times` x (a rank's size, first index, end or place, of a dim) `+ plus`, of which the rest after division by
    `modulo` where that is given: an integer once a rank is known."""

    dim: Dim
    # or, for a dim of one part, "start" and "stop": the first global index that the rank holds and the one behind its
    # last; "place": its number among pieces
    kind: str = "size"
    times: int = 1
    plus: int = 0
    modulo: int = 0

    def at(self, mesh: Mesh, coords: Mapping[str, int]) -> int:
        """The number on the rank at `coords`."""
        pieces = [chunk(p.size, mesh, p.axes, coords) for p in self.dim]
        if self.kind == "place":
            value = 0
            for axis in axes_of(self.dim):
                value = value * mesh[axis] + place(coords, axis)
        else:
            numbers = {"start": pieces[0][0], "stop": sum(pieces[0])}
            value = numbers.get(self.kind, math.prod(n for _, n in pieces))
        value = self.times * value + self.plus
        return value % self.modulo if self.modulo else value

    def most(self, mesh: Mesh) -> int:
        """The number on the rank that has the most of what it counts: the first, of ends the last."""
        return self.at(mesh, mesh.coords(mesh.size - 1 if self.kind == "stop" else 0))

    def __mod__(self, n: int) -> Local:
        return Local(self.dim, self.kind, self.times, self.plus, n)

    def __mul__(self, n: int) -> Local:
        if self.modulo:
            raise ValueError(f"{self} is not computed with any further")
        return Local(self.dim, self.kind, self.times * n, self.plus * n)

    __rmul__ = __mul__

    def __add__(self, n: int) -> Local:
        if self.modulo:
            raise ValueError(f"{self} is not computed with any further")
        return Local(self.dim, self.kind, self.times, self.plus + n)

    __radd__ = __add__

    def __sub__(self, n: int) -> Local:
        return self + -n

    def __rsub__(self, n: int) -> Local:
        return -self + n

    def __neg__(self) -> Local:
        return self * -1

    def __repr__(self) -> str:
        return f"Local({str(self)!r})"  # torch.fx writes it into a graph's code, which must parse

    def __str__(self) -> str:
        text = dim_text(self.dim) if self.kind == "size" else f"{self.kind}({dim_text(self.dim)})"
        times = {1: "", -1: "-"}.get(self.times, f"{self.times}*")
        text = f"{times}{text}{self.plus:+d}" if self.plus else f"{times}{text}"
        return f"({text})%{self.modulo}" if self.modulo else text


def local_size(dim: Dim) -> int | Local:
    """A dim's size on each rank: a plain number where no mesh dim splits it."""
    return Local(dim) if axes_of(dim) else math.prod(p.size for p in dim)


def local_start(dim: Dim) -> int | Local:
    """The first index of the dim each rank holds. Raises ValueError for a dim that is not one plain run."""
    return _of_run(dim, "start")


def local_stop(dim: Dim) -> int | Local:
    """The index behind the last that each rank holds. Raises ValueError likewise."""
    return _of_run(dim, "stop") if axes_of(dim) else math.prod(p.size for p in dim)


def local_place(dim: Dim) -> int | Local:
    """Which of the dim's pieces each rank holds, in the order of their indices. Raises ValueError likewise."""
    return _of_run(dim, "place")


def _of_run(dim: Dim, kind: str) -> int | Local:
    if not axes_of(dim):
        return 0
    if len(dim) != 1:
        raise ValueError(f"{dim_text(dim)} is not one run of indices")
    return Local(dim, kind)


def bind(tree: Any, mesh: Mesh, coords: Mapping[str, int] | None, leaf: Callable[[Any], Any] = lambda x: x) -> Any:
    """Arguments with every Local replaced by its number on one rank, and `leaf` applied to the other leaves. coords:
    of the rank; None for one that has the most of everything."""
    if isinstance(tree, Local):
        return tree.most(mesh) if coords is None else tree.at(mesh, coords)
    if isinstance(tree, (list, tuple)):
        items = [bind(x, mesh, coords, leaf) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {k: bind(v, mesh, coords, leaf) for k, v in tree.items()}
    return leaf(tree)
