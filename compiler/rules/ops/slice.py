"""Operators that cut stretches out of a dim or lay them side by side.

A cut leaves a dim free where it falls on borders of equal blocks: `(c n) -> (k n)`, every block split alike.
The blocks are as large as the cut allows; where only single indices are, each rank fetches those of its piece.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, inserted, line, without
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


def _times(count: int, size: Any) -> Any:
    """count * size, as a number where it is one."""
    return count * size if count > 1 else size if count else 0


def _blocks(count: int, name: str) -> str:
    """`n` or, for several blocks of it, `(c n)`."""
    return "n" if count == 1 else f"({name} n)"


# -- slices ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A slice in factors: how the whole dim and the slice read, and the slice's local bounds."""

    long: str
    short: str
    whole: str
    sizes: dict[str, int]
    start: int
    end: int
    step: int = 1
    blocks: bool = False  # start and end count blocks of factor n, not indices

    def bounds(self, site: Site) -> tuple[Any, Any, int]:
        """(start, end, step) on one rank."""
        if not self.blocks:
            return self.start, self.end, self.step
        return _times(self.start, site.size("n")), _times(self.end, site.size("n")), 1


def cut(n: int, start: int | None, end: int | None, step: int) -> Cut:
    """The widest blocks that a slice of a dim of n leaves in one piece."""
    low, high, _ = slice(start, end).indices(n)
    length = max(0, -(-(high - low) // step))
    if step > 1 and low < step and length * step == n:
        return Cut("(n c)", "n", "c", {"n": length, "c": step}, low, sys.maxsize, step)  # every step-th
    block = math.gcd(n, low, length)
    if step > 1 or not length or (block == 1 and length < n):
        return Cut("c", "k", "c k", {}, low, max(low, high), step)
    sizes = {"c": n // block, "k": length // block}
    sizes = {f: count for f, count in sizes.items() if count > 1}
    long, short = _blocks(n // block, "c"), _blocks(length // block, "k")
    first, last = low // block, (low + length) // block
    return Cut(long, short, " ".join(sizes), sizes | {"n": block}, first, last, blocks=True)


def _sliced(rank: int, at: int, part: Cut, call: Any, order: Sequence[str], linear: str) -> OpRule:
    """A rule of tensors that are "long" or "short" along dim `at`, the result last."""
    tensors = [dims(rank, {at: getattr(part, which)}) for which in order]
    return parse(
        line(tensors[:-1], tensors[-1:]), whole=part.whole, sizes=part.sizes, linear=linear,
        localize=lambda site: call(site, *part.bounds(site)),
    )  # fmt: skip


@rule(aten.slice.Tensor)
def _(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1, *, results: Any) -> OpRule:
    def local(site: Site, *bounds: Any) -> Any:
        return site.call(aten.slice.Tensor, site.args[0], dim, *bounds)

    part = cut(x.shape[dim], start, end, step)
    if part.long == "c" and results[0].shape[dim] == 1:
        return _one(x, dim % x.dim(), part.start, keep=True)
    if part.long == "c":  # single indices: each rank fetches those of its piece of the slice
        first = part.start
        return _moved(
            x, results[0], {dim % x.dim(): lambda i, n: [range(first + i * step, first + (i + n) * step, step)]}
        )
    return _sliced(x.dim(), dim, part, local, ("long", "short"), "0")


@rule(aten.slice_backward.default)
def _(grad: Any, shape: Any, dim: int, start: Any, end: Any, step: int, *, results: Any) -> OpRule:
    def local(site: Site, *bounds: Any) -> Any:
        return site.call(aten.slice_backward.default, site.args[0], site.result_shape(), dim, *bounds)

    part = cut(shape[dim], start, end, step)
    if part.long == "c" and step == 1 and grad.shape[dim]:
        first = part.start
        return _moved(grad, results[0], {dim % grad.dim(): lambda i, n: [range(i - first, i - first + n)]}, fill=0)
    return _sliced(len(shape), dim, part, local, ("short", "long"), "0")


def _moved(x: Any, result: Any, of: Mapping[int, Any], fill: float | None = None) -> OpRule:
    """A rule of a result whose indices of some dims are others of x, or none. of: per dim, which those of a piece
    of the result are, given its first index and size."""
    rank = x.dim()
    left, right = dims(rank, {d: f"x{d}" for d in of}), dims(rank, {d: f"y{d}" for d in of})
    tied = {f"y{d}": f"x{d}" for d in of}

    def localize(site: Site) -> Any:
        out = site.args[0]
        for d, wanted in of.items():
            if site.split(f"x{d}"):
                out = site.fetch(out, d, f"x{d}", wanted, f"y{d}", fill)
                continue
            (run,) = wanted(0, result.shape[d])
            if fill is None:
                out = site.call(aten.slice.Tensor, out, d, run.start, run.stop, run.step)
            else:
                ends = [-run.start, run.stop - x.shape[d]]
                out = site.call(aten.constant_pad_nd.default, out, [0, 0] * (rank - 1 - d) + ends, fill)
        return out

    names = " ".join([*tied, *tied.values()])
    linear = "" if fill else "0"
    return parse(line([left], [right]), plain=names, lone=names, follows=tied, linear=linear, localize=localize)


@rule(aten.slice_scatter.default)
def _(x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1, *, results: Any) -> OpRule:
    def local(site: Site, *bounds: Any) -> Any:
        return site.call(aten.slice_scatter.default, *site.args[:2], dim, *bounds)

    part = cut(x.shape[dim], start, end, step)
    return _sliced(x.dim(), dim, part, local, ("long", "short", "long"), "0 1")


# -- one index -------------------------------------------------------------------------------------


@rule(aten.select.int)
def _(x: Any, dim: int, index: int, *, results: Any) -> OpRule:
    return _one(x, dim % x.dim(), index % x.shape[dim], keep=False)


def _one(x: Any, d: int, at: int, keep: bool) -> OpRule:
    """The rule of one index of a dim. Where that is split, every rank fetches it."""
    names = dims(x.dim(), {d: "c"})

    def localize(site: Site) -> Any:
        x, *_ = site.args
        if not site.split("c"):
            return site.call(aten.slice.Tensor, x, d, at, at + 1) if keep else site.call(aten.select.int, x, d, at)
        out = site.fetch(x, d, "c", lambda *_: [range(at, at + 1)])
        return out if keep else site.call(aten.squeeze.dim, out, d)

    text = line([names], [dims(x.dim(), {d: "1"}) if keep else without(names, d)])
    return parse(text, joined="c", plain="c", lone="c", linear="0", localize=localize)


@rule(aten.select_backward.default)
def _(grad: Any, shape: Any, dim: int, index: int, *, results: Any) -> OpRule:
    names = dims(len(shape), {dim: "c"})
    return parse(line([without(names, dim)], [names]), whole="c", linear="0", shape_arg=1)


@rule(aten.select_scatter.default)
def _(x: Any, source: Any, dim: int, index: int, *, results: Any) -> OpRule:
    names = dims(x.dim(), {dim: "c"})
    return parse(line([names, without(names, dim)], [names]), whole="c", linear="0 1")


@rule(aten.unbind.int)
def _(x: Any, dim: int = 0, *, results: Any) -> OpRule:
    names = dims(x.dim(), {dim: "c"})
    return parse(line([names], [without(names, dim)] * len(results)), whole="c", linear="0")


@rule(aten.stack.default)
def _(tensors: Sequence[Any], dim: int = 0, *, results: Any) -> OpRule:
    names = dims(tensors[0].dim())
    return parse(line([names] * len(tensors), [inserted(names, dim, "c")]), whole="c", linear=_all(len(tensors)))


def _all(count: int) -> str:
    """A pending sum passes if every one of the operands holds it."""
    return " ".join(map(str, range(count)))


# -- pieces of a dim -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """A dim made of stretches: its name, theirs, what stays whole, and the blocks in each stretch."""

    all: str
    each: list[str]
    whole: str
    sizes: dict[str, int]
    counts: list[int] | None  # in blocks of factor n; None where the dim stays whole


def pieces(sizes: Sequence[int]) -> Pieces:
    """Stretches of a dim as blocks of their largest common size."""
    block = math.gcd(*sizes)
    if block == 0 or (block == 1 and len(sizes) > 1):
        each = [f"k{i}" for i in range(len(sizes))]
        return Pieces("c", each, " ".join(["c", *each]), {}, None)
    counts = [n // block for n in sizes]
    each = [_blocks(k, f"k{i}") for i, k in enumerate(counts)]
    known = {f"k{i}": k for i, k in enumerate(counts) if k != 1}
    known |= {"c": sum(counts)} if sum(counts) > 1 else {}
    return Pieces(_blocks(sum(counts), "c"), each, " ".join(known), known | {"n": block}, counts)


@rule(aten.split.Tensor)
@rule(aten.split_with_sizes.default)
@rule(aten.unsafe_split.Tensor)
@rule(aten.unsafe_split_with_sizes.default)
def _(x: Any, sizes: Any, dim: int = 0, *, results: Any) -> OpRule:
    lengths = [t.shape[dim] for t in results]
    cuts = pieces(lengths)

    def local(site: Site) -> Any:
        mine = [_times(k, site.size("n")) for k in cuts.counts] if cuts.counts else lengths
        return site.call(aten.split_with_sizes.default, site.args[0], mine, dim)

    rank = x.dim()
    text = line([dims(rank, {dim: cuts.all})], [dims(rank, {dim: k}) for k in cuts.each])
    return parse(text, whole=cuts.whole, sizes=cuts.sizes, linear="0", localize=local)


@rule(aten.cat.default)
def _(tensors: Sequence[Any], dim: int = 0, *, results: Any) -> OpRule:
    """Blocks stay blocks: `n, n -> (c n)`. An empty piece is not read; it may even be of another rank."""
    rank = results[0].dim()
    lengths = [t.shape[dim] if t.dim() == rank else 0 for t in tensors]
    joined = pieces(lengths)
    read = [f"z{i}" if not n else name for i, (n, name) in enumerate(zip(lengths, joined.each, strict=True))]
    operands = [dims(rank, {dim: name}) if t.dim() == rank else [name] for t, name in zip(tensors, read, strict=True)]
    empty = {f"k{i}": f"z{i}" for i, n in enumerate(lengths) if not n}
    whole = " ".join(dict.fromkeys([*(empty.get(f, f) for f in joined.whole.split()), *empty.values()]))
    sizes = {f: n for f, n in joined.sizes.items() if f not in empty}
    text = line(operands, [dims(rank, {dim: joined.all})])
    return parse(text, whole=whole, sizes=sizes, linear=_all(len(tensors)))


# -- dims turned around, padded --------------------------------------------------------------------


def _turned(x: Any, of: Callable[..., list[Any]], call: Callable[..., Any], by: Mapping[int, int]) -> OpRule:
    """A rule of a permutation of the indices of some dims. by: an amount for each; of(n, start, size, amount): which
    indices of n come to stand at those; call: the operator where none of the dims is split."""
    names = dims(x.dim())
    factors = " ".join(names[d] for d in sorted(by))

    def localize(site: Site) -> Any:
        out = call(site, {d: n for d, n in by.items() if not site.split(names[d])})
        for d, amount in by.items():
            if site.split(names[d]):
                n = x.shape[d]
                out = site.fetch(out, d, names[d], lambda start, size, n=n, k=amount: of(n, start, size, k))
        return out

    return parse(line([names], [names]), plain=factors, lone=factors, linear="0", localize=localize)


@rule(aten.flip.default)
def _(x: Any, turned: Sequence[int], *, results: Any) -> OpRule:
    def backwards(n: int, start: int, size: int, _: int) -> list[range]:
        return [range(n - 1 - start, n - 1 - start - size, -1)]

    def call(site: Site, here: Mapping[int, int]) -> Any:
        return site.call(aten.flip.default, site.args[0], list(here))

    return _turned(x, backwards, call, {d % x.dim(): 0 for d in turned})


@rule(aten.roll.default)
def _(x: Any, shifts: Any, turned: Any = (), *, results: Any) -> OpRule:
    """Without dims, the whole tensor is one row."""
    names, at = dims(x.dim()), [turned] if isinstance(turned, int) else list(turned)
    if not at:
        return parse(line([names], [names]), whole=" ".join(names), linear="0")
    amounts: dict[int, int] = {}
    for d, k in zip(at, [shifts] if isinstance(shifts, int) else shifts, strict=True):
        amounts[d % x.dim()] = amounts.get(d % x.dim(), 0) + k

    def around(n: int, start: int, size: int, k: int) -> list[range]:
        first = (start - k) % n if n else 0
        return [range(first, min(first + size, n)), range(max(first + size - n, 0))]

    def call(site: Site, here: Mapping[int, int]) -> Any:
        return site.call(aten.roll.default, site.args[0], list(here.values()), list(here)) if here else site.args[0]

    return _turned(x, around, call, amounts)


@rule(aten.rot90.default)
def _(x: Any, k: int = 1, turned: Sequence[int] = (0, 1), *, results: Any) -> OpRule:
    a, b = turned
    left, right = dims(x.dim(), {a: "p", b: "q"}), dims(x.dim(), {a: "q", b: "p"})
    return parse(line([left], [right if k % 2 else left]), whole="p q", linear="0")


@rule(aten.constant_pad_nd.default)
def _(x: Any, pad: Sequence[int], value: Any = 0, *, results: Any) -> OpRule:
    """pad: (before, after) of the last dim, then of the one before it, ...; negative ones cut off."""
    rank = x.dim()
    before = {rank - 1 - i: pad[2 * i] for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]}
    return _moved(
        x, results[0], {d: lambda i, n, k=k: [range(i - k, i - k + n)] for d, k in sorted(before.items())}, value
    )
