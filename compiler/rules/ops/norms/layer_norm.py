"""Layer norm, RMS norm, weight norm: over split normalised dims in two steps, other dims free.

Forward: the mean, then the squares around it. Backward: both sums in one collective. Weight and bias
gradients are pending over the batch dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import (
    Dims,
    any_split,
    cast,
    dense,
    joined_sums,
    local_sum,
    total,
    two_step,
    wide,
)
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


def standardize(site: Site, x: Any, over: Dims, count: int, eps: float, centered: bool = True) -> tuple:
    """(x centred and scaled, its mean or None, its inverse deviation, its variance), dims kept."""
    mean = None
    if centered:
        mean = site.call(aten.div.Scalar, total(site, x, over), count)
        x = site.call(aten.sub.Tensor, x, mean)
    square = site.call(aten.div.Scalar, total(site, site.call(aten.mul.Tensor, x, x), over), count)
    rstd = site.call(aten.rsqrt.default, site.call(aten.add.Scalar, square, eps))
    return site.call(aten.mul.Tensor, x, rstd), mean, rstd, square


def unstandardize(
    site: Site, g: Any, y: Any, rstd: Any, over: Dims, count: int, centered: bool = True
) -> tuple[Any, list[Any]]:
    """The gradient of what `standardize` took, given that of its result y; and the sums of g y and of g."""
    gy = site.call(aten.mul.Tensor, g, y)
    local = [local_sum(site, t, over, True) for t in ((gy, g) if centered else (gy,))]
    sums = joined_sums(site, local, over.values())
    for s, t in zip(sums, (y, None), strict=False):
        s = site.call(aten.div.Scalar, s, count)
        g = site.call(aten.sub.Tensor, g, s if t is None else site.call(aten.mul.Tensor, t, s))
    return site.call(aten.mul.Tensor, g, rstd), sums


def affine(site: Site, y: Any, weight: Any, bias: Any) -> Any:
    y = y if weight is None else site.call(aten.mul.Tensor, y, weight)
    return y if bias is None else site.call(aten.add.Tensor, y, bias)


# -- layer norm and RMS norm -----------------------------------------------------------------------


def _trailing(x: Any, shape: Sequence[int]) -> tuple[list[str], list[str], Dims]:
    """Names of the batch dims and of the normalised ones, and the latter by dim."""
    first = x.dim() - len(shape)
    lead, norm = dims(first), [f"n{i}" for i in range(len(shape))]
    return lead, norm, {first + i: n for i, n in enumerate(norm)}


def _layer_norm(op: Any, x: Any, shape: Any, params: list[Any], eps: float, results: Any) -> OpRule:
    """Both norms: params are (weight, bias), either of them None, or (weight,)."""
    lead, norm, over = _trailing(x, shape)
    acc, centered = wide(x.dtype), len(params) == 2

    def step(site: Site) -> Any:
        local = cast(site, site.args[0], x.dtype, acc)
        y, *stats, _ = standardize(site, local, over, math.prod(shape), eps, centered)
        weight, bias = (*site.args[2 : 2 + len(params)], None)[:2]
        y = cast(site, affine(site, y, weight, bias), acc, x.dtype)
        stats = stats if centered else stats[1:]
        return y, *(cast(site, s, acc, r.dtype) for s, r in zip(stats, results[1:], strict=True))

    text = line(
        [[*lead, *norm], *([norm] * sum(p is not None for p in params))],
        [[*lead, *norm], *([[*lead, *(["1"] * len(norm))]] * (len(results) - 1))],
    )
    return parse(text, joined=" ".join(norm), localize=two_step(op, norm, step))


@rule(aten.native_layer_norm.default)
def _(x: Any, shape: Any, weight: Any, bias: Any, eps: float, *, results: Any) -> OpRule:
    return _layer_norm(aten.native_layer_norm.default, x, shape, [weight, bias], eps, results)


@rule(aten._fused_rms_norm.default)
def _(x: Any, shape: Any, weight: Any, eps: float | None, *, results: Any) -> OpRule:
    eps = torch.finfo(wide(x.dtype)).eps if eps is None else eps
    return _layer_norm(aten._fused_rms_norm.default, x, shape, [weight], eps, results)


def _layer_norm_backward(
    op: Any, x: Any, shape: Any, stats: int, params: list[Any], mask: Sequence[bool], results: Any
) -> OpRule:
    """stats: how many tensors the forward saved, (mean, rstd) or (rstd,)."""
    lead, norm, over = _trailing(x, shape)
    acc, count, centered = wide(x.dtype), math.prod(shape), stats == 2

    def step(site: Site) -> Any:
        g, y = (cast(site, t, x.dtype, acc) for t in site.args[:2])
        *mean, rstd = site.args[3 : 3 + stats]
        y = site.call(aten.mul.Tensor, site.call(aten.sub.Tensor, y, mean[0]) if mean else y, rstd)
        rows = range(len(lead))
        out = [None] * len(mask)
        if mask[0]:
            weighted = affine(site, g, site.args[3 + stats], None)
            out[0], _ = unstandardize(site, weighted, y, rstd, over, count, centered)
        if mask[1]:
            out[1] = local_sum(site, site.call(aten.mul.Tensor, g, y), rows)
        if centered and mask[2]:
            out[2] = local_sum(site, g, rows)
        types = iter(r.dtype for r in results)
        return tuple(None if t is None else cast(site, t, acc, next(types)) for t in out)

    def localize(site: Site) -> Any:
        if any_split(site, norm):
            return step(site)
        return dense(op, range(3, 3 + stats), lead)(site)

    full, kept = [*lead, *norm], [*lead, *(["1"] * len(norm))]
    operands = [full, full, *([kept] * stats), *([norm] * sum(p is not None for p in params))]
    text = line(operands, [t for t, wanted in zip([full, norm, norm], mask, strict=False) if wanted])
    return parse(text, sum=" ".join(lead), linear="0", localize=localize)


@rule(aten.native_layer_norm_backward.default)
def _(g: Any, x: Any, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any, *, results: Any) -> OpRule:
    op = aten.native_layer_norm_backward.default
    return _layer_norm_backward(op, x, shape, 2, [weight, bias], mask, results)


@rule(aten._fused_rms_norm_backward.default)
def _(g: Any, x: Any, shape: Any, rstd: Any, weight: Any, mask: Any, *, results: Any) -> OpRule:
    return _layer_norm_backward(aten._fused_rms_norm_backward.default, x, shape, 1, [weight], mask, results)


# -- weight norm: split along the dim that keeps its own length per index; kernels die of an empty one --


def _weight_norm_names(v: Any, dim: int) -> tuple[list[str], list[str], str]:
    names = dims(v.dim(), {dim: "o"})
    return names, [n if n == "o" else "1" for n in names], " ".join(n for n in names if n != "o")


@rule(aten._weight_norm_interface.default)
def _(v: Any, g: Any, dim: int = 0, *, results: Any) -> OpRule:
    full, kept, whole = _weight_norm_names(v, dim)
    localize = dense(aten._weight_norm_interface.default, (0, 1), ["o"])
    return parse(line([full, kept], [full, kept]), whole=whole, nonempty="o", localize=localize)


@rule(aten._weight_norm_interface_backward.default)
def _(grad: Any, v: Any, g: Any, norms: Any, dim: int, *, results: Any) -> OpRule:
    full, kept, whole = _weight_norm_names(v, dim)
    localize = dense(aten._weight_norm_interface_backward.default, range(4), ["o"])
    text = line([full, full, kept, kept], [full, kept])
    return parse(text, whole=whole, nonempty="o", linear="0", localize=localize)
