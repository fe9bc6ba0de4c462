"""Operators that work along one dim: running sums and extremes, the largest few and the k-th, over a split dim in two
steps, each of a collective of reduced size; sorting, medians and modes, whose dim stays whole. Other dims are free.

Where a sorted element goes may be any rank, so a program, whose sizes are fixed, must have room for a whole piece from
every rank to every other: as much as gathering the values, which alone travel, as each rank works out the indices. To
exchange and merge sorted pieces in rounds would move values and indices, log2(n) (log2(n) + 1) / 2 pieces of each over
n ranks: for float32 more than the n - 1 pieces of a gather up to 16 ranks. The sum of a median's candidates likewise
is the whole: half of the elements come before it, which may be all that a rank has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, line
from shardc.compiler.rules.ops.reductions.reduce import reduced, reduction
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import cast, gathered, get, highest, lowest, two_step, wide
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

# operator -> where its dim stands among the arguments
ALONG = {
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.mode.default: 1,
    aten.median.dim: 1,
    aten.nanmedian.dim: 1,
}


def along(x: Any, dim: int, results: Any, **options: Any) -> OpRule:
    """`d0 n -> d0 k`: the dim may have another size in the results, or be gone from them."""
    at = list(reduced(x, dim))
    left, right = dims(x.dim(), dict.fromkeys(at, "n")), dims(x.dim(), dict.fromkeys(at, "k"))
    if results[0].dim() < x.dim():
        right.remove("k")
    whole = " ".join({n: None for n in (*left, *right) if n in ("n", "k")})
    return parse(line([left], [right] * len(results)), whole=whole, **options)


def _build(at: int) -> Callable[..., OpRule]:
    def build(x: Any, *args: Any, results: Any, **kwargs: Any) -> OpRule:
        return along(x, args[at - 1] if len(args) >= at else kwargs.get("dim", -1), results)

    return build


for _op, _at in ALONG.items():
    rule(_op)(_build(_at))


@rule(aten.median.default)
@rule(aten.nanmedian.default)
def _(x: Any, *, results: Any) -> OpRule:
    return reduction(x, reduced(x, None), whole="{gone}")


# -- running sums: each rank's own, and on top of it what the ranks before it come to -----------------


def _running(op: Any, total: Callable[..., Any], together: Any) -> Callable[..., OpRule]:
    """total(site, x, d) of a dim that is kept; together: joins what came before with a running one."""

    def build(x: Any, dim: int, *, dtype: Any = None, results: Any) -> OpRule:
        names, gone, out = dims(x.dim()), reduced(x, dim), results[0].dtype
        linear = "0" if op is aten.cumsum.default and (out.is_floating_point or out == x.dtype) else ""
        if out.is_complex and op is aten.logcumsumexp.default:
            return parse(line([names], [names]), whole=" ".join(gone.values()))

        def step(site: Site) -> Any:
            ((d, factor),) = gone.items()
            acc = wide(out)
            local = cast(site, site.args[0], x.dtype, acc)
            before = gathered(site, total(site, local, d), factor)
            before = site.call(aten.slice.Tensor, before, -1, 0, site.place(factor))
            before = site.call(aten.squeeze.dim, total(site, before, x.dim()), -1)
            return cast(site, site.call(together, site.call(op, local, d), before), acc, out)

        localize = two_step(op, gone.values(), step)
        return parse(line([names], [names]), plain=" ".join(gone.values()), linear=linear, localize=localize)

    return build


def _sum(site: Site, x: Any, d: int) -> Any:
    return site.call(aten.sum.dim_IntList, x, [d], True)


def _product(site: Site, x: Any, d: int) -> Any:
    return site.call(aten.prod.dim_int, x, d, True)


def _exponentials(site: Site, x: Any, d: int) -> Any:
    return site.call(aten.logsumexp.default, x, [d], True)


rule(aten.cumsum.default)(_running(aten.cumsum.default, _sum, aten.add.Tensor))
rule(aten.cumprod.default)(_running(aten.cumprod.default, _product, aten.mul.Tensor))
rule(aten.logcumsumexp.default)(_running(aten.logcumsumexp.default, _exponentials, aten.logaddexp.default))


# -- running extremes: of equals the last wins, and a NaN over all else ------------------------------


def _running_extreme(op: Any, how: str) -> Callable[..., OpRule]:
    nothing, as_good = (lowest, aten.ge.Tensor) if how == "max" else (highest, aten.le.Tensor)

    def build(x: Any, dim: int, *, results: Any) -> OpRule:
        names, gone = dims(x.dim()), reduced(x, dim)
        if not gone or x.dtype == torch.bool:
            return parse(line([names], [names, names]), whole=" ".join(gone.values()))
        ((d, factor),) = gone.items()
        ends, worst = [0, 0] * (x.dim() - 1 - d) + [1, 0], nothing(x.dtype)

        def step(site: Site) -> Any:
            # one more in front, so that a rank without any has a last, and the first rank something before it
            padded = site.call(aten.constant_pad_nd.default, site.args[0], ends, worst)
            value, at = _two(site, site.call(op, padded, d))
            at = site.call(aten.add.Scalar, at, site.start(factor) - 1)
            best, where = _before(site, value, at, op, d, factor, worst)
            value, at = (site.call(aten.slice.Tensor, y, d, 1, 2**63 - 1) for y in (value, at))
            own = site.call(as_good, value, best)
            own = site.call(aten.logical_or.default, own, site.call(aten.isnan.default, value))
            pairs = ((value, best), (at, where))
            return tuple(site.call(aten.where.self, own, *pair) for pair in pairs)

        localize = two_step(op, [factor], step)
        return parse(line([names], [names, names]), plain=factor, localize=localize)

    return build


def _before(site: Site, value: Any, at: Any, op: Any, d: int, factor: str, worst: Any) -> tuple[Any, Any]:
    """The extreme of all ranks before this one, and where it is."""
    lasts = (site.call(aten.slice.Tensor, y, d, -1, 2**63 - 1) for y in (value, at))
    lasts = (site.call(aten.slice.Tensor, gathered(site, y, factor), -1, 0, site.place(factor)) for y in lasts)
    values, places = (
        site.call(aten.constant_pad_nd.default, y, [1, 0], n) for y, n in zip(lasts, (worst, 0), strict=True)
    )
    best, rank = _two(site, site.call(op, values, -1))
    where = site.call(aten.gather.default, places, -1, rank)
    best, where = (site.call(aten.select.int, y, -1, -1) for y in (best, where))
    return best, where


rule(aten.cummax.default)(_running_extreme(aten.cummax.default, "max"))
rule(aten.cummin.default)(_running_extreme(aten.cummin.default, "min"))


# -- the largest few: each rank's, then of those ------------------------------------------------------


@rule(aten.topk.default)
def _topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, results: Any) -> OpRule:
    """Of equals those with the lowest indices, so that what fills up a short piece comes last."""
    gone, names = reduced(x, dim), dims(x.dim())
    if not gone or x.dtype == torch.bool or k == 0:
        return along(x, dim, results)
    ((d, factor),) = gone.items()

    def step(site: Site) -> Any:
        pair = _merged_few(site, x, k, d, factor, largest)
        return tuple(site.call(aten.slice.Tensor, y, d, 0, k) for y in pair)

    left, right = names, dims(x.dim(), {d: "k"})
    return parse(
        line([left], [right, right]), joined=factor, plain=factor, whole="k",
        localize=two_step(aten.topk.default, [factor], step),
    )  # fmt: skip


@rule(aten.kthvalue.default)
def _kth(x: Any, k: int, dim: int = -1, keepdim: bool = False, *, results: Any) -> OpRule:
    """The last of the smallest k, or of the largest, if those are fewer; where they are more than a quarter of all,
    gathering all moves no more."""
    gone, n = reduced(x, dim), x.shape[dim] if x.dim() else 1
    few = min(k, n - k + 1)
    if not gone or x.dtype == torch.bool or 4 * few > n:
        return along(x, dim, results)
    ((d, factor),) = gone.items()

    def step(site: Site) -> Any:
        pair = _merged_few(site, x, few, d, factor, largest=few < k)
        pair = [site.call(aten.slice.Tensor, y, d, few - 1, few) for y in pair]
        return tuple(y if keepdim else site.call(aten.squeeze.dim, y, d) for y in pair)

    localize = two_step(aten.kthvalue.default, [factor], step)
    return reduction(x, gone, keepdim, 2, joined=factor, plain=factor, localize=localize)


def _merged_few(site: Site, x: Any, k: int, d: int, factor: str, largest: bool) -> tuple[Any, Any]:
    """Each rank's largest or smallest k in one order, and their global places."""
    value, at = _largest_few(site, site.args[0], x, k, d, factor, largest)
    beyond = site.call(aten.ge.Scalar, at, site.size(factor))
    at = site.call(aten.masked_fill.Scalar, site.call(aten.add.Scalar, at, site.start(factor)), beyond, x.shape[d])
    values, places = (_in_row(site, gathered(site, y, factor), d) for y in (value, at))
    places, order = _two(site, site.call(aten.sort.stable, places, stable=True, dim=d))
    values = site.call(aten.gather.default, values, d, order)
    values, order = _two(site, site.call(aten.sort.stable, values, stable=True, dim=d, descending=largest))
    return values, site.call(aten.gather.default, places, d, order)


def _largest_few(site: Site, local: Any, x: Any, k: int, d: int, factor: str, largest: bool) -> list[Any]:
    """A rank's own k; where some rank has fewer, what fills a piece up comes after all equals."""
    if site.least(factor) >= k:
        return list(_two(site, site.call(aten.topk.default, local, k, d, largest)))
    worst = math.nan if x.dtype.is_floating_point and not largest else (lowest if largest else highest)(x.dtype)
    local = site.call(aten.constant_pad_nd.default, local, [0, 0] * (x.dim() - 1 - d) + [0, k], worst)
    every = site.call(aten.sort.stable, local, stable=True, dim=d, descending=largest)
    return [site.call(aten.slice.Tensor, y, d, 0, k) for y in _two(site, every)]


def _two(site: Site, pair: Any) -> tuple[Any, Any]:
    return get(site, pair, 0), get(site, pair, 1)


def _in_row(site: Site, x: Any, d: int) -> Any:
    """The last dim, of ranks, laid along dim d in front of what is there."""
    x = site.call(aten.movedim.int, x, -1, d)
    return site.call(aten.flatten.using_ints, x, d, d + 1)
