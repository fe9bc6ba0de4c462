"""Batch norm: statistics of the global batch however it is split; channels are free.

Training, over split dims: the mean, then the squares around it; backward both sums in one collective.
Running statistics follow the global ones. In evaluation the operator is pointwise, and the gradients
of weight and bias are pending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import apart, line
from shardc.compiler.rules.ops.norms.layer_norm import affine, standardize, unstandardize
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import cast, local_sum, two_step, wide
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten


def _dims(x: Any) -> tuple[list[str], dict[int, str]]:
    """The input's dims, and those that are normalised."""
    full = ["b", "c", *(f"s{i}" for i in range(x.dim() - 2))]
    return full, {i: n for i, n in enumerate(full) if n != "c"}


def _vectors(x: Any, tensors: Sequence[Any], prefix: str) -> list[list[str]]:
    """Statistics are per channel; what an operator leaves empty, or keeps for itself, has its own dim."""
    return [["c"] if t.shape == x.shape[1:2] else [f"{prefix}{i}"] for i, t in enumerate(tensors)]


def _alone(*lists: list[list[str]]) -> str:
    return " ".join(names[0] for tensors in lists for names in tensors if names != ["c"])


def _per_channel(site: Site, x: Any, rank: int) -> Any:
    """A vector over channels, shaped to be stretched over the input."""
    return None if x is None else site.call(aten.view.default, x, [1, site.size("c"), *([1] * (rank - 2))])


def _flat(site: Site, x: Any) -> Any:
    return site.call(aten.view.default, x, [site.size("c")])


# -- forward ---------------------------------------------------------------------------------------


def _forward(
    op: Any, x: Any, others: Sequence[Any], training: bool, momentum: float, eps: float, results: Any
) -> OpRule:
    """others: weight, bias and, of operators that have them, running mean and running variance, or None."""
    full, over = _dims(x)
    given = _vectors(x, [t for t in others if t is not None], "p")
    made = _vectors(x, results[1:], "r")
    # only what is empty, or kept by a kernel for its own backward, lacks the channels
    options: dict[str, Any] = {"joined": " ".join(full), "whole": _alone(given, made)}
    if training:
        count, types = math.prod(x.shape[d] for d in over), [r.dtype for r in results]
        shapes = [list(r.shape) for r in results]

        def step(site: Site) -> Any:
            return _train(site, x, over, count, momentum, eps, types, shapes)

        kept = any(r.numel() for r in results[3:4]) and len(results) in (4, 6)
        options["localize"] = step if kept else two_step(op, over.values(), step, fed=["c"])
    return parse(line([full, *given], [full, *made]), **options)


def _train(
    site: Site,
    x: Any,
    over: dict[int, str],
    count: int,
    momentum: float,
    eps: float,
    types: list[torch.dtype],
    shapes: list[list[int]],
) -> tuple:
    """The results out, mean, rstd[, reserve][, running mean, running variance]; x is the traced operand."""
    acc = wide(x.dtype)
    local, weight, bias = site.args[:3]
    y, mean, rstd, variance = standardize(site, cast(site, local, x.dtype, acc), over, count, eps)
    y = affine(site, y, *(_per_channel(site, p, x.dim()) for p in (weight, bias)))
    out = [cast(site, y, acc, x.dtype)]
    out += [cast(site, _flat(site, t), acc, types[1]) for t in (mean, rstd)]
    if len(types) in (4, 6):  # what a kernel keeps for its own backward, which this call does without
        out.append(site.call(aten.new_zeros.default, local, shapes[3], dtype=types[3]))
    if len(types) in (5, 6):
        unbiased = site.call(aten.mul.Scalar, variance, count / (count - 1) if count > 1 else math.nan)
        for old, now in zip(site.args[3:5], (mean, unbiased), strict=True):
            kept = site.call(aten.mul.Scalar, old, 1 - momentum)
            new = site.call(aten.mul.Scalar, _flat(site, now), momentum)
            out.append(cast(site, site.call(aten.add.Tensor, kept, new), acc, types[-1]))
    return tuple(out)


def _mutating(op: Any) -> Callable[..., OpRule]:
    """Running statistics are written in place, unknown to the program: such a call takes whole values."""

    def build(
        x: Any, w: Any, b: Any, rm: Any, rv: Any, training: bool, momentum: float, eps: float, *,
        results: Any,
    ) -> OpRule:  # fmt: skip
        if not training or rm is None:
            return _forward(op, x, [w, b, rm, rv], training, momentum, eps, results)
        return apart(tensors_in(x, w, b, rm, rv), results)

    return build


for _op in (aten.native_batch_norm.default, aten.cudnn_batch_norm.default):
    rule(_op)(_mutating(_op))


@rule(aten._native_batch_norm_legit.no_stats)
def _(x: Any, w: Any, b: Any, training: bool, momentum: float, eps: float, *, results: Any) -> OpRule:
    op = aten._native_batch_norm_legit.no_stats
    return _forward(op, x, [w, b], training, momentum, eps, results)


@rule(aten._native_batch_norm_legit_functional.default)
def _(x: Any, w: Any, b: Any, rm: Any, rv: Any, training: bool, momentum: float, eps: float, *, results: Any) -> OpRule:
    op = aten._native_batch_norm_legit_functional.default
    return _forward(op, x, [w, b, rm, rv], training, momentum, eps, results)


@rule(aten._batch_norm_with_update_functional.default)
def _(x: Any, w: Any, b: Any, rm: Any, rv: Any, momentum: float, eps: float, *, results: Any) -> OpRule:
    op = aten._batch_norm_with_update_functional.default
    return _forward(op, x, [w, b, rm, rv], True, momentum, eps, results)


@rule(aten._native_batch_norm_legit_no_training.default)
@rule(aten._batch_norm_no_update.default)
def _(x: Any, w: Any, b: Any, rm: Any, rv: Any, momentum: float, eps: float, *, results: Any) -> OpRule:
    return _forward(None, x, [w, b, rm, rv], False, momentum, eps, results)


# -- backward --------------------------------------------------------------------------------------


def _backward(
    op: Any, order: Sequence[int], args: Sequence[Any], train: bool, eps: float, mask: Any, results: Any
) -> OpRule:
    """order: where the gradient and the input are among the operands."""
    g, x = (args[i] for i in order)
    full, over = _dims(x)
    vectors = _vectors(x, [t for t in args[2:] if t is not None], "p")
    # tracing may show a gradient that the mask leaves out; running gives none
    shown = mask if len(results) == sum(mask) else [True] * 3
    made = [t for t, seen in zip([full, ["c"], ["c"]], shown, strict=True) if seen]
    count, types = math.prod(x.shape[d] for d in over), [r.dtype for r in results]

    def step(site: Site) -> Any:
        grads = _train_backward if train else _eval_backward
        local = [cast(site, site.args[i], x.dtype, wide(x.dtype)) for i in order]
        stats = site.args[5:7] if train else site.args[3:5]
        w, mean, rstd = (_per_channel(site, t, x.dim()) for t in (site.args[2], *stats))
        if not train:
            rstd = site.call(aten.rsqrt.default, site.call(aten.add.Scalar, rstd, eps))
        y = site.call(aten.mul.Tensor, site.call(aten.sub.Tensor, local[1], mean), rstd)
        dx, *sums = grads(site, local[0], y, rstd, over, count)
        out = [affine(site, dx, w, None), *(_flat(site, s) for s in sums)]
        kinds = iter(types)
        made_as = [next(kinds) if seen else None for seen in shown]
        return tuple(
            cast(site, t, wide(x.dtype), kind) if wanted and kind is not None else None
            for t, wanted, kind in zip(out, mask, made_as, strict=True)
        )

    kept = len(args) > 7 and args[7].numel()  # the forward may have made it up: then no kernel may see it
    normalised = " ".join(over.values())
    return parse(
        line([full, full, *vectors], made),
        whole=_alone(vectors),
        sum="" if train else normalised,
        joined=normalised if train else "",
        linear=str(order[0]),
        localize=step if kept else two_step(op, over.values(), step, fed=["c"]),
    )


def _train_backward(site: Site, g: Any, y: Any, rstd: Any, over: dict[int, str], count: int) -> tuple[Any, Any, Any]:
    dx, sums = unstandardize(site, g, y, rstd, over, count)
    return dx, *sums


def _eval_backward(site: Site, g: Any, y: Any, rstd: Any, over: dict[int, str], count: int) -> tuple[Any, Any, Any]:
    """With statistics that do not depend on the batch: the sums are this rank's share."""
    gy = site.call(aten.mul.Tensor, g, y)
    return site.call(aten.mul.Tensor, g, rstd), *(local_sum(site, t, over, True) for t in (gy, g))


@rule(aten.native_batch_norm_backward.default)
def _(
    g: Any, x: Any, w: Any, rm: Any, rv: Any, sm: Any, si: Any, train: bool, eps: float, mask: Any,
    *, results: Any,
) -> OpRule:  # fmt: skip
    op = aten.native_batch_norm_backward.default
    return _backward(op, (0, 1), [g, x, w, rm, rv, sm, si], train, eps, mask, results)


@rule(aten.batch_norm_backward.default)
def _(
    g: Any, x: Any, w: Any, rm: Any, rv: Any, sm: Any, si: Any, update: bool, eps: float, mask: Any,
    reserve: Any, *, results: Any,
) -> OpRule:  # fmt: skip
    op = aten.batch_norm_backward.default
    return _backward(op, (0, 1), [g, x, w, rm, rv, sm, si, reserve], update, eps, mask, results)


@rule(aten.cudnn_batch_norm_backward.default)
def _(x: Any, g: Any, w: Any, rm: Any, rv: Any, sm: Any, si: Any, eps: float, reserve: Any, *, results: Any) -> OpRule:
    op = aten.cudnn_batch_norm_backward.default
    return _backward(op, (1, 0), [x, g, w, rm, rv, sm, si, reserve], True, eps, [True] * 3, results)
