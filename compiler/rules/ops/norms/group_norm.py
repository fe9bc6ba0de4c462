"""Group norm: channels are `(g i)`; batch and groups are free, i and the dims after it take two steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import line
from shardc.compiler.rules.ops.norms.layer_norm import affine, standardize, unstandardize
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import any_split, cast, local_sum, packed, wide
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

FIRST_NORMALISED = 2  # of the dims `b g i ...`


def _rest(x: Any) -> list[str]:
    return [f"s{i}" for i in range(x.dim() - 2)]


def _view(site: Site, x: Any, names: Sequence[str]) -> Any:
    """x in the factors named, `1` for a dim to be stretched."""
    return site.call(aten.reshape.default, x, [1 if n == "1" else site.size(n) for n in names])


def _localize(op: Any, rest: Sequence[str], inner: int, at: int, step: Callable) -> Callable[[Site], Any]:
    """at: where the operator's arguments N, C, HxW, group begin. It takes no call without groups, and reads
    pieces as if they were contiguous."""

    def localize(site: Site) -> Any:
        if any_split(site, ["i", *rest]) or (site.split("g") and site.may_be_empty("g")):
            return step(site)
        groups, args = site.size("g"), site.args
        if any_split(site, ["b", "g"]):
            args = packed(site, range(at))
        counts = (site.size("b"), groups * inner, args[at + 2], groups)
        return site.call(op, *args[:at], *counts, *args[at + 4 :], **site.kwargs)

    return localize


@rule(aten.native_group_norm.default)
def _(x: Any, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float, *, results: Any) -> OpRule:
    rest, inner, acc = _rest(x), c // groups, wide(x.dtype)
    over = dict(enumerate(["i", *rest], start=FIRST_NORMALISED))

    def step(site: Site) -> Any:
        local, *params = site.args[:3]
        local = _view(site, cast(site, local, x.dtype, acc), ["b", "g", "i", *rest])
        y, *stats, _ = standardize(site, local, over, inner * math.prod(x.shape[2:]), eps)
        per_channel = ["1", "g", "i", *(["1"] * len(rest))]
        params = [p if p is None else _view(site, p, per_channel) for p in params]
        y = cast(site, affine(site, y, *params), acc, x.dtype)
        stats = [cast(site, _view(site, s, ["b", "g"]), acc, results[1].dtype) for s in stats]
        return site.call(aten.reshape.default, y, site.result_shape(0)), *stats

    full = ["b", "(g i)", *rest]
    params = [["(g i)"]] * sum(p is not None for p in (weight, bias))
    return parse(
        line([full, *params], [full, ["b", "g"], ["b", "g"]]),
        joined=" ".join(["i", *rest]),
        sizes={"g": groups},
        localize=_localize(aten.native_group_norm.default, rest, inner, 3, step),
    )


@rule(aten.native_group_norm_backward.default)
def _(
    g: Any, x: Any, mean: Any, rstd: Any, weight: Any, n: int, c: int, hw: int, groups: int, mask: Any,
    *, results: Any,
) -> OpRule:  # fmt: skip
    rest, inner, acc = _rest(x), c // groups, wide(x.dtype)
    over = dict(enumerate(["i", *rest], start=FIRST_NORMALISED))
    rows = [0, *list(over)[1:]]

    def step(site: Site) -> Any:
        factors, stretched = ["b", "g", "i", *rest], ["1"] * len(over)
        g, y = (_view(site, cast(site, t, x.dtype, acc), factors) for t in site.args[:2])
        mean, rstd = (_view(site, t, ["b", "g", *stretched]) for t in site.args[2:4])
        y = site.call(aten.mul.Tensor, site.call(aten.sub.Tensor, y, mean), rstd)
        out: list[Any] = []
        if mask[0]:
            w = site.args[4]
            w = w if w is None else _view(site, w, ["1", "g", "i", *(["1"] * len(rest))])
            weighted = affine(site, g, w, None)
            out.append(unstandardize(site, weighted, y, rstd, over, inner * math.prod(x.shape[2:]))[0])
        if mask[1]:
            out.append(local_sum(site, site.call(aten.mul.Tensor, g, y), rows))
        if mask[2]:
            out.append(local_sum(site, g, rows))
        done = [
            cast(site, site.call(aten.reshape.default, t, site.result_shape(i)), acc, results[i].dtype)
            for i, t in enumerate(out)
        ]
        return tuple(done.pop(0) if wanted else None for wanted in mask)

    full = ["b", "(g i)", *rest]
    operands = [full, full, ["b", "g"], ["b", "g"], *([["(g i)"]] if weight is not None else [])]
    wanted = [t for t, w in zip([full, ["(g i)"], ["(g i)"]], mask, strict=True) if w]
    return parse(
        line(operands, wanted),
        sum=" ".join(["b", *rest]),
        linear="0",
        sizes={"g": groups},
        localize=_localize(aten.native_group_norm_backward.default, rest, inner, 5, step),
    )
