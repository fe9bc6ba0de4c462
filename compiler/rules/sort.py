"""Operators that work along one dim: running sums and the largest few, over a split dim in two steps, each of a
collective of reduced size; sorting and other selection, whose dim stays whole. Other dims are free."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from shardc.compiler.rules.joint import cast, gathered, get, highest, lowest, two_step, wide
from shardc.compiler.rules.names import dims, line
from shardc.compiler.rules.reduce import reduced, reduction
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

# operator -> where its dim stands among the arguments
ALONG = {
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.mode.default: 1,
    aten.median.dim: 1,
    aten.nanmedian.dim: 1,
    aten.kthvalue.default: 2,
    aten.cummax.default: 1,
    aten.cummin.default: 1,
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


# -- the largest few: each rank's, then of those ------------------------------------------------------


@rule(aten.topk.default)
def _topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, results: Any) -> OpRule:
    """Of equals those with the lowest indices, so that what fills up a short piece comes last."""
    gone, names = reduced(x, dim), dims(x.dim())
    if not gone or x.dtype == torch.bool or k == 0:
        return along(x, dim, results)
    ((d, factor),) = gone.items()

    def step(site: Site) -> Any:
        value, at = _largest_few(site, site.args[0], x, k, d, factor, largest)
        beyond = site.call(aten.ge.Scalar, at, site.size(factor))
        at = site.call(aten.masked_fill.Scalar, site.call(aten.add.Scalar, at, site.start(factor)), beyond, x.shape[d])
        values, places = (_in_row(site, gathered(site, y, factor), d) for y in (value, at))
        places, order = _two(site, site.call(aten.sort.stable, places, stable=True, dim=d))
        values = site.call(aten.gather.default, values, d, order)
        values, order = _two(site, site.call(aten.sort.stable, values, stable=True, dim=d, descending=largest))
        places = site.call(aten.gather.default, places, d, order)
        return tuple(site.call(aten.slice.Tensor, y, d, 0, k) for y in (values, places))

    left, right = names, dims(x.dim(), {d: "k"})
    return parse(
        line([left], [right, right]), joined=factor, plain=factor, whole="k",
        localize=two_step(aten.topk.default, [factor], step),
    )  # fmt: skip


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
