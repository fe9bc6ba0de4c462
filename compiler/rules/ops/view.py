"""Operators that only rename where an element sits: reshapes, permutations, expansion, diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from string import ascii_lowercase
from typing import Any

import torch

from shardc.compiler.rules.notation import Shape, apart, broadcast, dims, inserted, line, without
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, RuleError, parse, rule

aten = torch.ops.aten


# -- one shape written as another ------------------------------------------------------------------


def regrouped(source: Shape, target: Shape, **options: Any) -> OpRule:
    """A row-major reshape in factors: `(a b) c -> a (b c)`, dims that fit no common factors whole."""
    head = _common(source, target)
    tail = _common(source[head:][::-1], target[head:][::-1])
    middle = _middle(source[head : len(source) - tail], target[head : len(target) - tail])
    first, last = dims(head), [f"e{i}" for i in range(tail)]
    left, right = ([*first, *names, *last] for names in middle[:2])
    return parse(line([left], [right]), whole=" ".join(middle[2]), sizes=middle[3], **options)


def _common(a: Shape, b: Shape) -> int:
    """How many leading dims are equal."""
    return next((i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n), min(len(a), len(b)))


def _middle(source: Shape, target: Shape) -> tuple[list[str], list[str], list[str], dict[str, int]]:
    """Both sides' dims in names, the names that must stay whole, and the sizes of those that are factors."""
    if math.prod(source) != math.prod(target) or 0 in source:  # beside a dim of size 0
        left, right = ([f"{side}{i}" for i in range(len(s))] for side, s in (("x", source), ("y", target)))
        return left, right, left + right, {}
    borders = [list(accumulate(s, mul)) for s in (source, target)]
    named: list[dict[int, str]] = [{}, {}]  # per side, the factor that ends at each border
    whole, sizes, names = [], {}, _letters()
    shared = sorted({1, *borders[0]} & {1, *borders[1]})
    for low, high in pairwise(shared):
        marks = sorted({low, *(m for side in borders for m in side if low < m <= high)})
        if all(m % n == 0 for n, m in pairwise(marks)):
            for n, m in pairwise(marks):
                named[0][m] = named[1][m] = name = next(names)
                sizes[name] = m // n
        else:
            for side, ends in zip(named, borders, strict=True):
                new = {m: next(names) for m in ends if low < m <= high}
                side |= new
                whole += new.values()
    left, right = (_dims(ends, table) for ends, table in zip(borders, named, strict=True))
    return left, right, whole, sizes


def _dims(ends: Sequence[int], named: dict[int, str]) -> list[str]:
    """Each dim's factors, for dims whose stretches end at the given borders."""
    out = []
    for low, high in pairwise([1, *ends]):
        factors = [named[m] for m in sorted(named) if low < m <= high]
        out.append(factors[0] if len(factors) == 1 else f"({' '.join(factors)})" if factors else "1")
    return out


def _letters() -> Any:
    yield from ascii_lowercase
    yield from (f"{a}{b}" for a in ascii_lowercase for b in ascii_lowercase)


def _reshape(site: Site) -> Any:
    """Not view: a local piece may lie in memory as no view of it can."""
    return site.call(aten.reshape.default, site.args[0], site.result_shape())


@rule(aten.view.default)
@rule(aten._unsafe_view.default)
@rule(aten.reshape.default)
@rule(aten._reshape_alias.default)
def _(x: Any, *shape: Any, results: Any, **kwargs: Any) -> OpRule:
    return regrouped(x.shape, results[0].shape, linear="0", localize=_reshape)


@rule(aten.view.dtype)
def _(x: Any, dtype: Any, *, results: Any) -> OpRule:
    """Bits read as another type: a sum of them means nothing, and the last dim may change its size."""
    if x.shape == results[0].shape:
        return parse("... -> ...")
    return parse("... n -> ... m", whole="n m")


# -- dims moved, dropped, stretched ----------------------------------------------------------------


@rule(aten.permute.default)
def _(x: Any, order: Sequence[int], *, results: Any) -> OpRule:
    names = dims(x.dim())
    return parse(line([names], [[names[d] for d in order]]), linear="0")


@rule(aten.transpose.int)
def _(x: Any, a: int, b: int, *, results: Any) -> OpRule:
    names = dims(x.dim())
    if names:
        swapped = list(names)
        swapped[a], swapped[b] = names[b], names[a]
        return parse(line([names], [swapped]), linear="0")
    return parse("_ -> _", linear="0")


@rule(aten.t.default)
def _(x: Any, *, results: Any) -> OpRule:
    return parse(line([dims(x.dim())], [dims(x.dim())[::-1]]), linear="0")


@rule(aten.unsqueeze.default)
def _(x: Any, at: int, *, results: Any) -> OpRule:
    return parse(line([dims(x.dim())], [inserted(dims(x.dim()), at, "1")]), linear="0")


@rule(aten.squeeze.default)
@rule(aten.squeeze.dim)
@rule(aten.squeeze.dims)
def _(x: Any, at: Any = None, *, results: Any) -> OpRule:
    """A rank may hold one row of a dim that is not of size one: the call says which dims to drop."""
    asked = range(x.dim()) if at is None else [at] if isinstance(at, int) else at
    gone = [d % x.dim() for d in asked if x.dim() and x.shape[d] == 1]

    def squeeze(site: Site) -> Any:
        return site.call(aten.squeeze.dims, site.args[0], gone)

    names = dims(x.dim(), dict.fromkeys(gone, "1"))
    return parse(line([names], [without(names, *gone)]), linear="0", localize=squeeze)


@rule(aten.expand.default)
def _(x: Any, size: Any, *, results: Any, implicit: bool = False) -> OpRule:
    shape = results[0].shape
    names = dims(len(shape))
    return parse(line([broadcast(x.shape, shape, names)], [names]), linear="0", shape_arg=1)


@rule(aten.repeat.default)
def _(x: Any, repeats: Sequence[int], *, results: Any) -> OpRule:
    """Copies of a dim, one after another: `n -> (r n)`."""
    new = len(repeats) - x.dim()
    names = dims(x.dim())
    sizes = {f"r{i}": r for i, r in enumerate(repeats) if i < new or r != 1}
    copies = [f"r{i}" for i in range(new)]
    copies += [f"(r{i} {n})" if f"r{i}" in sizes else n for i, n in enumerate(names, new)]
    return parse(line([names], [copies]), linear="0", whole=" ".join(sizes), sizes=sizes)


# -- strides, windows, diagonals: what they read is one pattern over whole dims ----------------------


@rule(aten.as_strided.default)
def _(x: Any, size: Any, stride: Any, storage_offset: Any = None, *, results: Any) -> OpRule:
    """Reads memory, not elements, so the memory must lie on a rank as it did when the call was traced."""
    if not x.is_contiguous() or x.storage_offset():
        raise RuleError("as_strided of a tensor that is not contiguous from the start of its memory")

    def local(site: Site) -> Any:
        copy = site.call(aten.clone.default, site.args[0], memory_format=torch.contiguous_format)
        return site.call(aten.as_strided.default, copy, size, stride, storage_offset)

    left, right = dims(x.dim()), [f"e{i}" for i in range(results[0].dim())]
    return parse(line([left], [right]), whole=" ".join(left + right), linear="0", localize=local)


@rule(aten.unfold.default)
def _(x: Any, at: int, size: int, step: int, *, results: Any) -> OpRule:
    if x.dim() == 0:
        return parse("_ -> w", whole="w", linear="0")
    windows = [*dims(x.dim(), {at: "k"}), "w"]
    return parse(line([dims(x.dim(), {at: "n"})], [windows]), whole="n k w", linear="0")


@rule(aten.unfold_backward.default)
def _(grad: Any, sizes: Any, at: int, size: int, step: int, *, results: Any) -> OpRule:
    if any(m != n for i, (m, n) in enumerate(zip(grad.shape, sizes, strict=False)) if i != at % len(sizes)):
        return apart([grad], results)  # istft stretches its window so
    windows = [*dims(len(sizes), {at: "k"}), "w"]
    return parse(line([windows], [dims(len(sizes), {at: "n"})]), whole="n k w", linear="0", shape_arg=1)


def _off_diagonal(rank: int, a: int, b: int) -> tuple[list[str], list[str]]:
    """The names of a tensor and of its diagonal over dims a and b."""
    full = dims(rank, {a: "p", b: "q"})
    return full, [*without(full, a, b), "k"]


@rule(aten.diagonal.default)
def _(x: Any, offset: int = 0, a: int = 0, b: int = 1, *, results: Any) -> OpRule:
    full, diagonal = _off_diagonal(x.dim(), a, b)
    return parse(line([full], [diagonal]), whole="p q k", linear="0")


@rule(aten.diagonal_backward.default)
def _(grad: Any, sizes: Any, offset: int, a: int, b: int, *, results: Any) -> OpRule:
    full, diagonal = _off_diagonal(len(sizes), a, b)
    return parse(line([diagonal], [full]), whole="p q k", linear="0", shape_arg=1)


@rule(aten.diagonal_scatter.default)
def _(x: Any, source: Any, offset: int = 0, a: int = 0, b: int = 1, *, results: Any) -> OpRule:
    full, diagonal = _off_diagonal(x.dim(), a, b)
    return parse(line([full, diagonal], [full]), whole="p q k", linear="0 1")


@rule(aten.diag_embed.default)
def _(x: Any, offset: int = 0, a: int = -2, b: int = -1, *, results: Any) -> OpRule:
    rank = x.dim() + 1
    names = iter(dims(x.dim() - 1))
    full = ["p" if d == a % rank else "q" if d == b % rank else next(names) for d in range(rank)]
    return parse(line([[*dims(x.dim() - 1), "k"]], [full]), whole="p q k", linear="0")


def _triangle(op: Any) -> None:
    """Rows in one run make a triangle too, its diagonal moved by the number of the first of them."""

    def build(x: Any, diagonal: int = 0, *, results: Any) -> OpRule:
        def local(site: Site) -> Any:
            return site.call(op, site.args[0], site.start("m") + diagonal)

        return parse("... m n -> ... m n", whole="n", plain="m", linear="0", localize=local)

    rule(op)(build)


_triangle(aten.tril.default)
_triangle(aten.triu.default)

# channels blocked over a square of pixels, and back
rule(aten.pixel_shuffle.default, "... (c i j) h w -> ... c (h i) (w j)", whole="i j", linear="0")


def _unshuffle(site: Site) -> Any:
    """In steps: the operator itself gives an empty piece a wrong shape."""
    *lead, c, _, _ = site.operand_shape()
    h, i, w, j = (site.size(f) for f in "hiwj")
    n = len(lead)
    pixels = site.call(aten.reshape.default, site.args[0], [*lead, c, h, i, w, j])
    blocks = site.call(aten.permute.default, pixels, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return site.call(aten.reshape.default, blocks, site.result_shape())


rule(
    aten.pixel_unshuffle.default, "... c (h i) (w j) -> ... (c i j) h w",
    whole="i j", linear="0", localize=_unshuffle,
)  # fmt: skip


@rule(aten.channel_shuffle.default)
def _(x: Any, groups: int, *, results: Any) -> OpRule:
    names = dims(x.dim() - 2)
    left, right = [["b", f"({two})", *names] for two in ("g c", "c g")]
    return parse(line([left], [right]), whole="g", sizes={"g": groups}, linear="0")
