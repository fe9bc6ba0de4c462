"""Softmax and log-softmax: over a split dim in two steps, each of one reduced-size collective.

Forward: the peak (max), then the sum of the exponentials. Backward: one sum. Other dims are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, line
from shardc.compiler.rules.ops.reductions.reduce import reduced
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import cast, largest, total, two_step, wide
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


def _forward(op: Any) -> Callable[..., OpRule]:
    def build(x: Any, dim: int, *_: Any, results: Any, **__: Any) -> OpRule:
        along, out = reduced(x, dim), results[0].dtype
        acc = wide(out)

        def step(site: Site) -> Any:
            local = cast(site, site.args[0], x.dtype, acc)
            peak = largest(site, local, x.dim(), along, acc)
            off = site.call(aten.sub.Tensor, local, peak)
            power = site.call(aten.exp.default, off)
            mass = total(site, power, along)
            if op is aten._log_softmax.default:
                y = site.call(aten.sub.Tensor, off, site.call(aten.log.default, mass))
            else:
                y = site.call(aten.div.Tensor, power, mass)
            if op is aten._safe_softmax.default:  # a row of -inf only gives zeros there
                y = site.call(aten.masked_fill.Scalar, y, site.call(aten.eq.Scalar, peak, -math.inf), 0)
            return cast(site, y, acc, out)

        names = dims(x.dim())
        return parse(line([names], [names]), localize=two_step(op, along.values(), step))

    return build


for _op in (aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default):
    rule(_op)(_forward(_op))


def _backward(op: Any) -> Callable[..., OpRule]:
    def build(grad: Any, y: Any, dim: int, input_dtype: Any, *, results: Any) -> OpRule:
        along, acc = reduced(y, dim), wide(y.dtype)

        def step(site: Site) -> Any:
            g, p = cast(site, site.args[0], grad.dtype, acc), cast(site, site.args[1], y.dtype, acc)
            if op is aten._softmax_backward_data.default:
                weighted = site.call(aten.mul.Tensor, g, p)
                away = site.call(aten.mul.Tensor, p, total(site, weighted, along))
                dx = site.call(aten.sub.Tensor, weighted, away)
            else:
                p = site.call(aten.exp.default, p)
                away = site.call(aten.mul.Tensor, p, total(site, g, along))
                dx = site.call(aten.sub.Tensor, g, away)
            return cast(site, dx, acc, results[0].dtype)

        names = dims(y.dim())
        localize = two_step(op, along.values(), step)
        return parse(line([names, names], [names]), linear="0", localize=localize)

    return build


for _op in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default):
    rule(_op)(_backward(_op))
