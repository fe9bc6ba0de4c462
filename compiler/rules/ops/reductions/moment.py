"""Variances, norms and logsumexp: reductions that do more after their sum, and so join it themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from shardc.compiler.rules.notation import dims
from shardc.compiler.rules.ops.reductions.reduce import DimArg, reduced, reduction
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import cast, filled, join, largest, local_sum, total, two_step, wide
from shardc.compiler.rules.table import OpRule, rule

aten = torch.ops.aten

# -- variance: the mean first, then the squares around it, for the digits that one pass would lose ----


def _variance(kind: str, op: Any) -> Callable[..., OpRule]:
    """The rule of one of var, std, var_mean, std_mean."""
    results = 2 if kind.endswith("_mean") else 1
    how = "sum" if kind == "var" else "joined"

    def build(x: Any, dim: DimArg, correction: float, keepdim: bool) -> OpRule:
        gone = reduced(x, dim)
        if x.dtype.is_complex:
            return reduction(x, gone, keepdim, results, whole="{gone}")
        step = partial(
            _variance_step, kind=kind, gone=gone, keepdim=keepdim, dtype=x.dtype,
            count=math.prod(x.shape[d] for d in gone), correction=correction,
        )  # fmt: skip
        localize = two_step(op, gone.values(), step, fed=dims(x.dim()))  # it warns of empty ones
        return reduction(x, gone, keepdim, results, **{how: "{gone}"}, localize=localize)

    return build


def _variance_step(
    site: Site,
    kind: str,
    gone: dict[int, str],
    keepdim: bool,
    dtype: torch.dtype,
    count: int,
    correction: float,
) -> Any:
    acc = wide(dtype)
    x = cast(site, site.args[0], dtype, acc)
    mean = site.call(aten.div.Scalar, total(site, x, gone), count)
    off = site.call(aten.sub.Tensor, x, mean)
    square = local_sum(site, site.call(aten.mul.Tensor, off, off), gone, keepdim)
    if kind != "var":
        square = join(site, square, gone.values())
    out = site.call(aten.div.Scalar, square, max(count - correction, 0))
    if kind.startswith("std"):
        out = site.call(aten.sqrt.default, out)
    out = cast(site, out, acc, dtype)
    if not kind.endswith("_mean"):
        return out
    mean = mean if keepdim else site.call(aten.squeeze.dims, mean, sorted(gone))
    return out, cast(site, mean, acc, dtype)


def _register_variance(kind: str) -> None:
    packet = getattr(aten, kind)

    @rule(packet.default)
    def _all(x: Any, unbiased: bool = True, *, results: Any) -> OpRule:
        return _variance(kind, packet.default)(x, None, int(unbiased), False)

    @rule(packet.dim)
    def _dim(x: Any, dim: DimArg, unbiased: bool = True, keepdim: bool = False, *, results: Any) -> OpRule:
        return _variance(kind, packet.dim)(x, dim, int(unbiased), keepdim)

    @rule(packet.correction)
    def _correction(
        x: Any, dim: DimArg = None, *, correction: float | None = None, keepdim: bool = False, results: Any
    ) -> OpRule:
        return _variance(kind, packet.correction)(x, dim, 1 if correction is None else correction, keepdim)


for _kind in ("var", "std", "var_mean", "std_mean"):
    _register_variance(_kind)


# -- norms -----------------------------------------------------------------------------------------


def _norm(op: Any, x: Any, p: float | None, dim: DimArg, keepdim: bool, dtype: Any, results: Any) -> OpRule:
    p, gone, out = 2 if p is None else p, reduced(x, dim), results[0].dtype
    if p < 0 and not math.isinf(p):
        return reduction(x, gone, keepdim, whole="{gone}")
    how = {0: "sum", 1: "sum", math.inf: "max", -math.inf: "min"}.get(p, "joined")
    acc = None if x.dtype.is_complex else wide(dtype or x.dtype)

    def step(site: Site) -> Any:
        local = site.args[0]
        if math.isinf(p):
            local = filled(site, local, x.dim(), gone, 0 if p > 0 else math.inf)
        y = site.call(aten.linalg_vector_norm.default, local, p, sorted(gone), keepdim, dtype=acc)
        if how == "joined":
            y = site.call(aten.pow.Tensor_Scalar, y, p)
            y = site.call(aten.pow.Tensor_Scalar, join(site, y, gone.values()), 1 / p)
        return cast(site, y, acc or out, out)

    return reduction(x, gone, keepdim, **{how: "{gone}"}, localize=two_step(op, gone.values(), step))


@rule(aten.linalg_vector_norm.default)
def _vector_norm(
    x: Any, ord: float = 2, dim: DimArg = None, keepdim: bool = False, *, dtype: Any = None, results: Any
) -> OpRule:
    return _norm(aten.linalg_vector_norm.default, x, ord, dim, keepdim, dtype, results)


def _register_norm(op: Any, names: Sequence[str]) -> None:
    """The overloads of the older norm differ only in which arguments they have."""

    @rule(op)
    def build(x: Any, *args: Any, dtype: Any = None, results: Any, **kwargs: Any) -> OpRule:
        given = dict(zip(names, args, strict=False)) | kwargs
        dim, keepdim = given.get("dim"), given.get("keepdim", False)
        return _norm(op, x, given.get("p", 2), dim, keepdim, dtype, results)


_register_norm(aten.norm.Scalar, ["p"])
_register_norm(aten.norm.ScalarOpt_dim, ["p", "dim", "keepdim"])
_register_norm(aten.norm.ScalarOpt_dtype, ["p"])
_register_norm(aten.norm.ScalarOpt_dim_dtype, ["p", "dim", "keepdim"])


@rule(aten.logsumexp.default)
def _logsumexp(x: Any, dim: DimArg, keepdim: bool = False, *, results: Any) -> OpRule:
    gone, out = reduced(x, dim), results[0].dtype

    def step(site: Site) -> Any:
        acc = wide(out)
        local = cast(site, site.args[0], x.dtype, acc)
        peak = largest(site, local, x.dim(), gone, acc)
        # a row of nothing but infinities has no distance to its peak
        infinite = site.call(aten.eq.Scalar, site.call(aten.abs.default, peak), math.inf)
        peak = site.call(aten.masked_fill.Scalar, peak, infinite, 0)
        y = site.call(aten.exp.default, site.call(aten.sub.Tensor, local, peak))
        y = site.call(aten.log.default, total(site, y, gone))
        y = site.call(aten.add.Tensor, y, peak)
        return cast(site, y if keepdim else site.call(aten.squeeze.dims, y, sorted(gone)), acc, out)

    localize = two_step(aten.logsumexp.default, gone.values(), step)
    return reduction(x, gone, keepdim, joined="{gone}", localize=localize)
