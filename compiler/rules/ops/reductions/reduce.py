"""Reductions over dims: sums and means, extremes, products, truth.

A split dim leaves a pending result. The count of a mean is that of the whole tensor, and the extreme of
nothing, which operators refuse, is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import cast, filled, gathered, highest, join, lowest, two_step, wide
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

DimArg = int | Sequence[int] | None


def reduced(x: Any, dim: DimArg) -> dict[int, str]:
    """The dims a call reduces, with their factors; no dim means all."""
    rank = x.dim()
    chosen = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return {d % rank: f"d{d % rank}" for d in chosen} if rank else {}


def reduction(x: Any, gone: dict[int, str], keepdim: bool = False, results: int = 1, /, **options: Any) -> OpRule:
    """`d0 d1 -> d0`, or `d0 d1 -> d0 1`; `{gone}` in an option stands for the reduced factors."""
    names = dims(x.dim())
    left = [("1" if i in gone else n) for i, n in enumerate(names) if keepdim or i not in gone]
    words = " ".join(gone.values())
    options = {k: v.format(gone=words) if isinstance(v, str) else v for k, v in options.items()}
    return parse(line([names], [left] * results), **options)


# -- sums ------------------------------------------------------------------------------------------


@rule(aten.sum.default)
@rule(aten.sum.dim_IntList)
def _sum(x: Any, dim: DimArg = None, keepdim: bool = False, *, dtype: Any = None, results: Any) -> OpRule:
    """A pending sum passes, unless the cast to `dtype` cuts fractions off."""
    out = results[0].dtype
    cut = x.dtype.is_floating_point and not (out.is_floating_point or out.is_complex)
    return reduction(x, reduced(x, dim), keepdim, sum="{gone}", linear="" if cut else "0")


@rule(aten.nansum.default)
def _nansum(x: Any, dim: DimArg = None, keepdim: bool = False, *, dtype: Any = None, results: Any) -> OpRule:
    return reduction(x, reduced(x, dim), keepdim, sum="{gone}")


@rule(aten.count_nonzero.dim_IntList)
@rule(aten.count_nonzero.default)
def _count(x: Any, dim: DimArg = None, *, results: Any) -> OpRule:
    return reduction(x, reduced(x, dim), sum="{gone}")


def _mean(op: Any) -> Callable[..., OpRule]:
    def build(x: Any, dim: DimArg = None, keepdim: bool = False, *, dtype: Any = None, results: Any) -> OpRule:
        gone, out = reduced(x, dim), results[0].dtype
        count = math.prod(x.shape[d] for d in gone)

        def step(site: Site) -> Any:
            return share_of_mean(site, site.args[0], sorted(gone), keepdim, count, out)

        localize = two_step(op, gone.values(), step)
        return reduction(x, gone, keepdim, sum="{gone}", linear="0", localize=localize)

    return build


def share_of_mean(site: Site, x: Any, dims: list[int], keepdim: bool, count: int, dtype: torch.dtype) -> Any:
    """What this rank's elements add to a mean over `count` of them."""
    acc = wide(dtype)
    x = site.call(aten.sum.dim_IntList, x, dims, keepdim, dtype=acc)
    return cast(site, site.call(aten.div.Scalar, x, count), acc, dtype)


rule(aten.mean.default)(_mean(aten.mean.default))
rule(aten.mean.dim)(_mean(aten.mean.dim))


# -- extremes, products, truth ---------------------------------------------------------------------


def _extreme(op: Any, how: str) -> Callable[..., OpRule]:
    def build(x: Any, dim: DimArg = None, keepdim: bool = False, *, results: Any) -> OpRule:
        gone = reduced(x, dim)
        value = (lowest if how == "max" else highest)(x.dtype)

        def step(site: Site) -> Any:
            local, *rest = site.args
            return site.call(op, filled(site, local, x.dim(), gone, value), *rest, **site.kwargs)

        return reduction(x, gone, keepdim, **{how: "{gone}"}, localize=two_step(op, gone.values(), step))

    return build


for _op, _how in (
    (aten.amax.default, "max"),
    (aten.max.default, "max"),
    (aten.amin.default, "min"),
    (aten.min.default, "min"),
):
    rule(_op)(_extreme(_op, _how))


@rule(aten.aminmax.default)
def _aminmax(x: Any, *, dim: int | None = None, keepdim: bool = False, results: Any) -> OpRule:
    gone = reduced(x, dim)
    where = sorted(gone)

    def step(site: Site) -> Any:
        low = filled(site, site.args[0], x.dim(), gone, highest(x.dtype))
        high = filled(site, site.args[0], x.dim(), gone, lowest(x.dtype))
        return (
            join(site, site.call(aten.amin.default, low, where, keepdim), gone.values(), "min"),
            join(site, site.call(aten.amax.default, high, where, keepdim), gone.values(), "max"),
        )

    localize = two_step(aten.aminmax.default, gone.values(), step)
    return reduction(x, gone, keepdim, 2, joined="{gone}", localize=localize)


# -- extremes with their indices: each rank's best and where it is, then the best of those ------------


def _with_index(how: str, values: bool) -> Callable[..., OpRule]:
    """max.dim or argmax, min.dim or argmin. Of equals the first wins, and a NaN over all else, as in argmax itself."""
    largest = how == "max"
    op = getattr(aten, how).dim if values else getattr(aten, f"arg{how}").default

    def build(x: Any, dim: int | None = None, keepdim: bool = False, *, results: Any) -> OpRule:
        gone, count = reduced(x, dim), len(results)
        if x.dtype == torch.bool:
            return reduction(x, gone, keepdim, count, whole="{gone}")

        def step(site: Site) -> Any:
            pair = _best(site, x, gone, aten.argmax.default if largest else aten.argmin.default, largest)
            if not keepdim:
                pair = tuple(site.call(aten.squeeze.dims, y, sorted(gone)) for y in pair)
            return pair if values else pair[1]

        localize = two_step(op, gone.values(), step)
        return reduction(x, gone, keepdim, count, joined="{gone}", plain="{gone}", localize=localize)

    return build


def _best(site: Site, x: Any, gone: dict[int, str], op: Any, largest: bool) -> tuple[Any, Any]:
    """The extreme and its index in the reduced dims laid flat, which stay with size one. Innermost dim first, and
    of each the lowest index: of equals, the first."""
    value, at, stride = site.args[0], None, 1
    for d in sorted(gone, reverse=True):
        factor = gone[d]
        value = filled(site, value, x.dim(), {d: factor}, (lowest if largest else highest)(x.dtype))
        if at is not None:
            at = filled(site, at, x.dim(), {d: factor}, 0)
        here = site.call(op, value, d, True)
        value = site.call(aten.gather.default, value, d, here)
        whole = site.call(aten.add.Scalar, here, site.start(factor)) if site.split(factor) else here
        whole = site.call(aten.mul.Scalar, whole, stride) if stride > 1 else whole
        at = whole if at is None else site.call(aten.add.Tensor, whole, site.call(aten.gather.default, at, d, here))
        if site.split(factor):
            values, places = gathered(site, value, factor), gathered(site, at, factor)
            rank = site.call(op, values, -1, True)
            value, at = (
                site.call(aten.squeeze.dim, site.call(aten.gather.default, y, -1, rank), -1) for y in (values, places)
            )
        stride *= x.shape[d]
    return value, at


for _how in ("max", "min"):
    rule(getattr(aten, _how).dim)(_with_index(_how, values=True))
    rule(getattr(aten, f"arg{_how}").default)(_with_index(_how, values=False))


def _truth(how: str) -> Callable[..., OpRule]:
    def build(x: Any, dim: DimArg = None, keepdim: bool = False, *, results: Any) -> OpRule:
        gone = {} if dim == [] else reduced(x, dim)  # these alone take an empty list for no dim at all
        return reduction(x, gone, keepdim, **{how: "{gone}"})

    return build


for _packet, _how in ((aten.any, "max"), (aten.all, "min")):
    for _op in (_packet.default, _packet.dim, _packet.dims):
        rule(_op)(_truth(_how))


@rule(aten.prod.default)
def _prod(x: Any, *, dtype: Any = None, results: Any) -> OpRule:
    return reduction(x, reduced(x, None), prod="{gone}")


@rule(aten.prod.dim_int)
def _prod_dim(x: Any, dim: int, keepdim: bool = False, *, dtype: Any = None, results: Any) -> OpRule:
    return reduction(x, reduced(x, dim), keepdim, prod="{gone}")
