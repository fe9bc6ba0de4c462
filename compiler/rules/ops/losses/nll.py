"""Negative log likelihood, with the classes split, the batch split, or both.

Each rank picks the scores of the classes it owns, and one collective adds them up, the total weight with
them. The backward needs none: a rank marks the classes it owns.
"""

from __future__ import annotations

from typing import Any

import torch

from shardc.compiler.rules.notation import line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import (
    cast,
    filled,
    get,
    join,
    joined_sums,
    local_sum,
    two_step,
    wide,
)
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2  # the operator's codes for its reductions


def _names(x: Any) -> tuple[list[str], list[str], int]:
    """Dims of the scores, those of the target, and which dim the classes are."""
    batch = ["n", *(f"s{i}" for i in range(x.dim() - 2))] if x.dim() > 1 else []
    at = 1 if batch else 0
    return [*batch[:at], "c", *batch[at:]], batch, at


def _owned(site: Site, target: Any, ignore: int) -> tuple[Any, Any]:
    """(the target counted from this rank's first class, whether it is one of this rank's)."""
    here = site.call(aten.sub.Scalar, target, site.start("c"))
    own = site.call(aten.ge.Scalar, here, 0)
    own = site.call(aten.logical_and.default, own, site.call(aten.lt.Scalar, here, site.size("c")))
    return here, site.call(aten.logical_and.default, own, site.call(aten.ne.Scalar, target, ignore))


def _picked(site: Site, x: Any, at: int, ignore: int) -> list[Any]:
    """Per target: minus the weighted score, and the weight; 0 where another rank has to say.

    x: the scores of the traced call; at: the dim of the classes.
    """
    local, target, weight = site.args[:3]
    here, own = _owned(site, target, ignore)
    index = site.call(aten.where.ScalarOther, own, here, 0)
    local = filled(site, local, x.dim(), {at: "c"}, 0)
    score = site.call(aten.gather.default, local, at, site.call(aten.unsqueeze.default, index, at))
    score = site.call(aten.neg.default, site.call(aten.squeeze.dim, score, at))
    if weight is None:
        mass = site.call(aten.ones_like.default, score)
    else:
        mass = site.call(aten.index.Tensor, filled(site, weight, 1, {0: "c"}, 0), [index])
        score = site.call(aten.mul.Tensor, score, mass)
    return [site.call(aten.where.ScalarOther, own, t, 0) for t in (score, mass)]


def _forward(op: Any, x: Any, weight: Any, reduction: int, ignore: int) -> OpRule:
    full, batch, at = _names(x)
    reduction = SUM if reduction == NONE and not batch else reduction  # one score is its own sum
    acc, rows = wide(x.dtype), range(len(batch))

    def step(site: Site) -> Any:
        if site.split("c"):
            parts = _picked(site, x, at, ignore)
            if reduction == NONE:
                return join(site, parts[0], ["c"]), site.call(aten.new_zeros.default, parts[0], [])
            parts = [local_sum(site, cast(site, t, x.dtype, acc), rows) for t in parts]
        else:
            scores, target, w = site.args[:3]
            scores, w = (t if t is None else cast(site, t, x.dtype, acc) for t in (scores, w))
            both = site.call(op, scores, target, w, SUM, ignore)
            parts = [get(site, both, i) for i in range(2)]
        parts = joined_sums(site, parts, full)
        if reduction == MEAN:
            parts[0] = site.call(aten.div.Tensor, *parts)
        return tuple(cast(site, t, acc, x.dtype) for t in parts)

    operands = [full, batch, *([["c"]] if weight is not None else [])]
    results = [batch if reduction == NONE else [], []]
    # complete also where it could stay pending: the backward is given the total weight
    localize = two_step(op, ["c"] if reduction == NONE else full, step)
    return parse(line(operands, results), plain="c", joined=" ".join(full), localize=localize)


def _backward(op: Any, x: Any, weight: Any, reduction: int, ignore: int) -> OpRule:
    full, batch, at = _names(x)

    def step(site: Site) -> Any:
        g, _, target, w, _, _, mass = site.args
        here, own = (site.call(aten.unsqueeze.default, t, at) for t in _owned(site, target, ignore))
        shape = [site.size("c") if n == "c" else 1 for n in full]
        classes = site.call(aten.arange.default, site.size("c"), dtype=torch.int64, device=x.device)
        mark = site.call(aten.eq.Tensor, site.call(aten.view.default, classes, shape), here)
        mark = site.call(aten.logical_and.default, mark, own)
        g = site.call(aten.neg.default, site.call(aten.div.Tensor, g, mass) if reduction == MEAN else g)
        g = site.call(aten.unsqueeze.default, g, at) if reduction == NONE else g
        if w is not None:
            g = site.call(aten.mul.Tensor, g, site.call(aten.view.default, w, shape))
        return site.call(aten.where.ScalarOther, mark, g, 0)

    grad = batch if reduction == NONE else []
    operands = [grad, full, batch, *([["c"]] if weight is not None else []), []]
    return parse(line(operands, [full]), plain="c", linear="0", localize=two_step(op, ["c"], step))


def _register(name: str) -> None:
    forward, backward = getattr(aten, name + "_forward").default, getattr(aten, name + "_backward").default

    @rule(forward)
    def _(x: Any, target: Any, weight: Any, reduction: int, ignore: int, *, results: Any) -> OpRule:
        return _forward(forward, x, weight, reduction, ignore)

    @rule(backward)
    def _(g: Any, x: Any, target: Any, weight: Any, reduction: int, ignore: int, mass: Any, *, results: Any) -> OpRule:
        return _backward(backward, x, weight, reduction, ignore)


_register("nll_loss")
_register("nll_loss2d")
