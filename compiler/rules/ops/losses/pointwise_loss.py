"""Pointwise losses: a mean or a sum over every dim, pending where one is split, with the global count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import broadcast, dims, line
from shardc.compiler.rules.ops.reductions.reduce import share_of_mean
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import two_step
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2  # the operators' codes for their reductions

# Where the reduction stands among the arguments: a call may leave it out, for the mean.
FORWARD = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.huber_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
    aten.binary_cross_entropy_with_logits.default: 4,
}
BACKWARD = {
    aten.mse_loss_backward.default: 3,
    aten.smooth_l1_loss_backward.default: 3,
    aten.huber_loss_backward.default: 3,
    aten.soft_margin_loss_backward.default: 3,
    aten.binary_cross_entropy_backward.default: 4,
}


def _given(at: int, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return args[at] if len(args) > at else kwargs.get("reduction", MEAN)


def _call(site: Site, op: Any, at: int, reduction: int) -> Any:
    """The local call with another reduction."""
    if len(site.args) > at:
        return site.call(op, *site.args[:at], reduction, *site.args[at + 1 :], **site.kwargs)
    return site.call(op, *site.args, **{**site.kwargs, "reduction": reduction})


def _forward(op: Any, at: int) -> Callable[..., OpRule]:
    def build(*args: Any, results: Any, **kwargs: Any) -> OpRule:
        reduction, tensors = _given(at, args, kwargs), tensors_in(args, kwargs)
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        names, everything = dims(len(shape)), list(range(len(shape)))
        operands = [broadcast(t.shape, shape, names) for t in tensors]
        if reduction == NONE:
            return parse(line(operands, [names]))

        def step(site: Site) -> Any:
            each = _call(site, op, at, NONE)
            return share_of_mean(site, each, everything, False, math.prod(shape), results[0].dtype)

        localize = two_step(op, names, step) if reduction == MEAN else None
        return parse(line(operands, [[]]), sum=" ".join(names), localize=localize)

    return build


def _backward(op: Any, at: int) -> Callable[..., OpRule]:
    def build(*args: Any, results: Any, **kwargs: Any) -> OpRule:
        reduction, shape = _given(at, args, kwargs), results[0].shape
        names = dims(len(shape))
        operands = [broadcast(t.shape, shape, names) for t in tensors_in(args, kwargs)]

        def step(site: Site) -> Any:
            return site.call(aten.div.Scalar, _call(site, op, at, SUM), math.prod(shape))

        localize = two_step(op, names, step) if reduction == MEAN else None
        return parse(line(operands, [names]), linear="0", localize=localize)

    return build


for _op, _at in FORWARD.items():
    rule(_op)(_forward(_op, _at))
for _op, _at in BACKWARD.items():
    rule(_op)(_backward(_op, _at))
