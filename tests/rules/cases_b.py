"""Calls that prove the rules of reductions, softmax, norms, losses, attention, convolution, sorting, randomness."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
F64 = torch.float64

Case = tuple[Any, tuple, dict[str, Any]]


def real(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Numbers that are all different, of both signs, and the same on every run."""
    n = math.prod(shape)
    mixed = torch.arange(n, dtype=F64).mul(0.61803).remainder(1)
    return (mixed * 3 - 1.4).reshape(shape).to(dtype)


def positive(*shape: int) -> Tensor:
    """Numbers strictly between 0 and 1."""
    return real(*shape) / 3.1 + 0.475


def whole(*shape: int, low: int = 0, high: int = 5, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers from low to high - 1."""
    n = math.prod(shape)
    return (torch.arange(n) * 7919 % 101 % (high - low) + low).reshape(shape).to(dtype)


def case(op: Any, *args: Any, **kwargs: Any) -> Case:
    return op, args, kwargs


SHAPES = [(7, 5), (2, 1, 3), (4,), ()]


def _reductions() -> list[Case]:
    out = []
    for shape in SHAPES:
        x = real(*shape)
        for op in (aten.sum, aten.nansum, aten.mean, aten.max, aten.min, aten.any, aten.all, aten.prod):
            out.append(case(op.default, x > 0.3 if op in (aten.any, aten.all) else x))
        out += [case(op.default, x) for op in (aten.amax, aten.amin, aten.count_nonzero, aten.aminmax)]
        out += [case(op.default, x, b) for op in SPREADS for b in (True, False)[x.dim() == 0 :]]
        out += [case(op, x) for op in (aten.linalg_vector_norm.default, aten.norm.Scalar)]
    return out


SPREADS = (aten.var, aten.std, aten.var_mean, aten.std_mean)


def _over_dims() -> list[Case]:
    out = []
    x, b, i = real(3, 7, 2), real(3, 7, 2) > 0.3, whole(3, 7, 2)
    for dim in ([1], [0, -1], None, []):
        for keep in (False, True):
            out += [case(op, x, dim, keep) for op in (aten.sum.dim_IntList, aten.mean.dim)]
            out += [case(op.dims, b, dim, keep) for op in (aten.any, aten.all)]
            out += [case(op.correction, x, dim, correction=2, keepdim=keep) for op in SPREADS]
            out += [case(op.dim, x, dim, keepdim=keep) for op in SPREADS]
            if dim is not None:
                out += [case(op, x, dim, keep) for op in (aten.amax.default, aten.amin.default)]
            if dim:
                out += [case(aten.logsumexp.default, x, dim, keep)]
    for dim in (0, -2):
        out += [case(op.dim, b, dim, True) for op in (aten.any, aten.all)]
        out += [case(op, x, dim) for op in (aten.max.dim, aten.min.dim, aten.argmax.default)]
        out += [case(aten.argmin.default, x, dim, True), case(aten.prod.dim_int, x, dim, True)]
        out += [case(aten.aminmax.default, x, dim=dim, keepdim=True), case(aten.prod.dim_int, i, dim)]
        out += [case(aten.nansum.default, x, [dim]), case(aten.count_nonzero.dim_IntList, x, [dim])]
    out += [case(aten.argmax.default, x), case(aten.argmin.default, x)]
    out += [case(op, i, [1]) for op in (aten.sum.dim_IntList, aten.amax.default, aten.amin.default)]
    out += [case(aten.amax.default, b, [1]), case(aten.any.dim, whole(3, 5, dtype=torch.uint8), 1)]
    out += [case(aten.sum.dim_IntList, x, [1], dtype=torch.int64), case(aten.sum.default, b)]
    out += [case(aten.mean.dim, i, [1], dtype=F64), case(aten.sum.default, x + 1j)]
    out += [case(op.default, x + 1j * x) for op in (aten.var, aten.mean, aten.linalg_vector_norm)]
    out += [case(op, torch.full((5, 3), math.nan, dtype=F64)) for op in (aten.nansum.default, aten.var.default)]
    rows = torch.tensor([[-math.inf] * 3, [math.inf, 1, 2], [-math.inf, 0, 1]], dtype=F64)
    out += [case(aten.logsumexp.default, rows, [1]), case(aten.logsumexp.default, rows, [0])]
    return out


def _norms_of_tensors() -> list[Case]:
    x, out = real(3, 7, 2), []
    for p in (0, 1, 2, 3, 2.5, -1, math.inf, -math.inf):
        out += [case(aten.linalg_vector_norm.default, x, p, d, k) for d, k in (([1], True), ([0, 2], False))]
        out += [case(aten.norm.ScalarOpt_dim, x, p, [1]), case(aten.norm.Scalar, x, p)]
    out += [case(aten.linalg_vector_norm.default, x.float(), 2, None, False, dtype=F64)]
    out += [case(aten.norm.ScalarOpt_dim_dtype, x.float(), 2, [1], False, dtype=F64)]
    out += [case(aten.norm.ScalarOpt_dtype, x.float(), 2, dtype=F64), case(aten.norm.ScalarOpt_dim, x, None, [0])]
    return out


def _softmaxes() -> list[Case]:
    out = []
    for shape, dim in (((5, 7), 1), ((3, 2, 5), -2), ((7, 1), 1), ((2,), 0), ((), 0)):
        x, g = real(*shape), real(*shape).flip(0) if shape else real()
        for name in ("_softmax", "_log_softmax"):
            forward, backward = getattr(aten, name).default, getattr(aten, name + "_backward_data").default
            out += [case(forward, x, dim, False), case(backward, g, forward(x, dim, False), dim, F64)]
        out += [case(aten._safe_softmax.default, x, dim)]
    rows = torch.tensor([[-math.inf] * 5, [-math.inf] * 4 + [1], [0, 1, 2, 3, -math.inf]], dtype=F64)
    out += [case(op, rows, 1, False) for op in (aten._softmax.default, aten._log_softmax.default)]
    return [*out, case(aten._safe_softmax.default, rows, 1), case(aten._safe_softmax.default, rows.t(), 0)]


def _layer_norms() -> list[Case]:
    out = []
    forward, backward = aten.native_layer_norm.default, aten.native_layer_norm_backward.default
    for shape, k in (((3, 7), 1), ((2, 5, 1), 1), ((3, 2, 5), 2), ((7,), 1)):
        x, norm = real(*shape), shape[-k:]
        w, b = positive(*norm), real(*norm)
        for params in ((w, b), (w, None), (None, None)):
            y, mean, rstd = forward(x, norm, *params, 1e-5)
            mask = [True, params[0] is not None, params[1] is not None]
            out += [case(forward, x, norm, *params, 1e-5)]
            out += [case(backward, positive(*shape), x, norm, mean, rstd, *params, mask)]
        out += [case(backward, positive(*shape), x, norm, mean, rstd, w, b, [False, True, True])]
        for params in ((w, 1e-5), (None, None)):
            out += [case(aten._fused_rms_norm.default, x, norm, *params)]
    v = real(5, 3, 2)
    for dim in (0, 2):
        g = positive(*(n if i == dim else 1 for i, n in enumerate(v.shape)))
        norms = aten._weight_norm_interface(v, g, dim)[1]
        out += [case(aten._weight_norm_interface.default, v, g, dim)]
        out += [case(aten._weight_norm_interface_backward.default, v * v, v, g, norms, dim)]
    return out


def _group_norms() -> list[Case]:
    out = []
    forward, backward = aten.native_group_norm.default, aten.native_group_norm_backward.default
    for shape, groups in (((2, 6, 5), 3), ((3, 5, 2, 3), 5), ((1, 7), 1), ((5, 2, 1, 1, 3), 1)):
        x, (n, c, *rest) = real(*shape), shape
        w, b, counts = positive(c), real(c), (n, c, math.prod(rest), groups)
        for params in ((w, b), (None, None)):
            y, mean, rstd = forward(x, *params, *counts, 1e-5)
            mask = [True, params[0] is not None, params[1] is not None]
            out += [case(forward, x, *params, *counts, 1e-5)]
            out += [case(backward, positive(*shape), x, mean, rstd, params[0], *counts, mask)]
    return out


def _batch_norms() -> list[Case]:
    out = []
    for shape in ((5, 3), (4, 2, 7), (2, 3, 1, 2), (3, 1, 2)):
        x, c = real(*shape), shape[1]
        g, w, b, rm, rv = positive(*shape), positive(c), real(c), real(c), positive(c)
        mean, rstd, hyper = real(c), positive(c), (0.1, 1e-5)
        for train in (True, False):
            out += [
                case(aten._native_batch_norm_legit_functional.default, x, w, b, rm, rv, train, *hyper),
                case(aten.native_batch_norm.default, x, w, b, *((None, None) if train else (rm, rv)), train, *hyper),
                case(aten.native_batch_norm_backward.default, g, x, w, rm, rv, mean, rstd, train, 1e-5, [True] * 3),
                case(
                    aten.native_batch_norm_backward.default,
                    *(g, x, None, None, None, mean, rstd, True, 1e-5, [True, False, False]),
                ),
            ]
        empty = torch.empty(0, dtype=torch.uint8)
        out += [
            case(aten._native_batch_norm_legit.no_stats, x, None, None, True, *hyper),
            case(aten._batch_norm_with_update_functional.default, x, w, b, rm, rv, *hyper),
            case(aten._batch_norm_no_update.default, x, w, b, rm, rv, *hyper),
            case(aten._native_batch_norm_legit_no_training.default, x, w, b, rm, rv, *hyper),
            case(aten.batch_norm_backward.default, g, x, w, rm, rv, mean, rstd, True, 1e-5, [True] * 3, empty),
            case(aten.batch_norm_backward.default, g, x, w, rm, rv, mean, rstd, False, 1e-5, [True] * 3, empty),
        ]
    none = torch.empty(0, dtype=F64)
    mask = [True, False, True]
    return [
        *out,
        case(aten.native_batch_norm_backward.default, g, x, w, rm, rv, none, none, False, 1e-5, mask),
        case(aten.native_batch_norm.default, x, w, b, rm, rv, True, 0.0, 1e-5),
    ]


def _likelihoods() -> list[Case]:
    out = []
    for name, shape in (("nll_loss", (7, 5)), ("nll_loss", (3, 2)), ("nll_loss", (5,)), ("nll_loss2d", (3, 5, 2, 1))):
        forward, backward = getattr(aten, name + "_forward").default, getattr(aten, name + "_backward").default
        x, c = real(*shape), shape[min(1, len(shape) - 1)]
        target = whole(*(shape[:1] + shape[2:] if len(shape) > 1 else ()), high=c)
        for weight in (None, positive(c)):
            for reduction in (0, 1, 2):
                for ignore in (-100, 1):
                    loss, mass = forward(x, target, weight, reduction, ignore)
                    out += [case(forward, x, target, weight, reduction, ignore)]
                    out += [case(backward, loss + 2, x, target, weight, reduction, ignore, mass)]
    return out


def _losses() -> list[Case]:
    out = []
    for shape in ((7, 2), (3, 1, 5), (1,), ()):
        x, y = positive(*shape), positive(*shape).mul(0.7)
        for reduction in (0, 1, 2):
            g = y + 1 if reduction == 0 else real()
            for name, extra in (("mse_loss", ()), ("smooth_l1_loss", (0.5,)), ("huber_loss", (0.3,)), ("soft_margin_loss", ())):
                forward, backward = getattr(aten, name).default, getattr(aten, name + "_backward").default
                out += [case(forward, x, y, reduction, *extra), case(backward, g, x, y, reduction, *extra)]
            bce, logits = aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits
            for w in (None, y + 0.1):
                out += [case(bce.default, x, y, w, reduction), case(logits.default, x, y, w, w, reduction)]
                out += [case(aten.binary_cross_entropy_backward.default, g, x, y, w, reduction)]
        out += [case(op.default, x, y) for op in (aten.mse_loss, aten.huber_loss, aten.binary_cross_entropy)]
        out += [case(aten.binary_cross_entropy_with_logits.default, x, y, reduction=2)]
        out += [case(aten.binary_cross_entropy_backward.default, real(), x, y)]
    x, y = real(3, 5), positive(3, 5)
    out += [case(aten.binary_cross_entropy_with_logits.default, x, y, None, positive(5))]
    return [*out, case(aten.mse_loss.default, x, real(5), 1), case(aten.mse_loss_backward.default, real(), x, real(5), 1)]


def _embeddings() -> list[Case]:
    out = []
    for shape, table in (((3, 2), (13, 5)), ((7,), (16, 1)), ((), (3, 2)), ((2, 1, 3), (2, 7)), ((5,), (1, 3))):
        w, at = real(*table), whole(*shape, high=table[0])
        g = positive(*shape, table[1])
        out += [case(aten.embedding.default, w, at), case(aten.embedding.default, w, at, 1)]
        for pad, by_count in ((-1, False), (0, False), (1, True)):
            out += [case(aten.embedding_dense_backward.default, g, at, table[0], pad, by_count)]
    return out


def _bags() -> list[Case]:
    out = []
    w, at, offsets = real(7, 5), whole(6, high=7), torch.tensor([0, 2, 5])
    for mode in (0, 1, 2):
        each = positive(6) if mode == 0 else None
        for op in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
            out += [case(op, w, at, offsets, False, mode), case(op, w, at, offsets, False, mode, False, each)]
        y, bag, size, most = aten._embedding_bag(w, at, offsets, False, mode, False, each)
        bag = torch.tensor([0, 0, 1, 1, 1, 2])
        out += [case(aten._embedding_bag_dense_backward.default, y, at, bag, size, most, 7, False, mode, each)]
    op = aten._embedding_bag_per_sample_weights_backward.default
    return [*out, case(op, real(3, 5), w, at, offsets, bag, 0)]


def _sorts() -> list[Case]:
    out = []
    x = real(3, 7, 2)
    for shape, dim in (((3, 7, 2), 1), ((5, 1), -1), ((2,), 0), ((), 0)):
        x = real(*shape)
        for op in (aten.sort, aten.mode, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin, aten.cumsum):
            out += [case(op.default, x, dim)]
        out += [case(op.dim, x, dim, True) for op in (aten.median, aten.nanmedian)]
        out += [case(op.default, x) for op in (aten.median, aten.nanmedian)]
        out += [case(aten.topk.default, x, 1, dim), case(aten.kthvalue.default, x, 1, dim)]
        out += [case(aten.sort.stable, x, stable=True, dim=dim, descending=True)]
    out += [case(op.default, real(3, 5)) for op in (aten.sort, aten.mode)]
    out += [case(aten.topk.default, real(5, 3), 2, 0), case(aten.topk.default, real(5, 3), 2)]
    return [*out, case(aten.kthvalue.default, real(5, 3), 2), case(aten.median.dim, real(5, 3), 1)]


def _draws() -> list[Case]:
    x, n, p = real(5, 3), whole(5, 3, high=9), positive(5, 3)
    out = [case(getattr(aten, name).default, [5, 3]) for name in ("rand", "randn")]
    out += [case(getattr(aten, name).generator, [5, 3], generator=None) for name in ("rand", "randn")]
    out += [case(aten.randint.default, 9, [5, 3]), case(aten.randint.low, 2, 9, [5])]
    out += [case(aten.randint.generator, 9, [5], generator=None)]
    out += [case(aten.randint.low_generator, 2, 9, [5], generator=None)]
    out += [case(aten.randperm.default, 7), case(aten.randperm.generator, 7, generator=None)]
    out += [case(aten.normal.float_float, 0.0, 1.0, [5, 3]), case(aten.multinomial.default, p, 2)]
    out += [case(getattr(aten, name).default, x) for name in ("rand_like", "randn_like")]
    out += [case(getattr(aten, name).generator, x, generator=None) for name in ("rand_like", "randn_like")]
    out += [case(aten.randint_like.default, n, 7), case(aten.randint_like.low_dtype, n, 2, 7)]
    out += [case(aten.randint_like.generator, n, 7, generator=None)]
    out += [case(aten.randint_like.low_generator_dtype, n, 2, 7, generator=None)]
    out += [case(aten.randint_like.Tensor, n, torch.tensor(7))]
    out += [case(aten.randint_like.Tensor_generator, n, torch.tensor(7), generator=None)]
    for name in ("uniform", "normal_functional", "exponential", "cauchy", "log_normal"):
        out += [case(getattr(aten, name).default, x)]
    out += [case(op, x, 0.3) for op in (aten.bernoulli.p, aten.geometric.default)]
    out += [case(aten.random.default, n), case(aten.random.to, n, 9), case(getattr(aten.random, "from"), n, 2, 9)]
    out += [case(aten.bernoulli.default, p), case(aten.bernoulli.Tensor, x, p), case(aten.poisson.default, p)]
    out += [case(aten.normal.Tensor_float, x, 1.0), case(aten.normal.float_Tensor, 0.0, p)]
    out += [case(aten.normal.Tensor_Tensor, x, p), case(aten.binomial.default, n.double(), p)]
    out += [case(aten._sample_dirichlet.default, p), case(aten._standard_gamma.default, p)]
    for rate, train in ((0.5, True), (0.5, None), (0.5, False), (0.0, True), (1.0, True)):
        out += [case(aten.native_dropout.default, x, rate, train)]
    out += [case(aten.native_dropout_backward.default, p, x > 0, 2.0)]
    out += [case(aten.rrelu_with_noise_functional.default, x, p, 0.1, 0.3, training) for training in (True, False)]
    return [*out, case(aten.rrelu_with_noise_backward.default, p, x, p, 0.1, 0.3, True, False)]


CASES: list[Case] = [
    *_reductions(),
    *_over_dims(),
    *_norms_of_tensors(),
    *_softmaxes(),
    *_layer_norms(),
    *_group_norms(),
    *_batch_norms(),
    *_likelihoods(),
    *_losses(),
    *_embeddings(),
    *_bags(),
    *_sorts(),
    *_draws(),
]
