"""Calls that prove the rules of norms, losses, embeddings and random numbers."""

from __future__ import annotations

import math

import torch

from shardc.compiler.rules.ops.random.bits import DRAW
from tests.rules.operands import F64, Case, case, positive, real, whole

aten = torch.ops.aten


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
                case(
                    aten.native_batch_norm.default,
                    x,
                    w,
                    b,
                    *((None, None) if train else (rm, rv)),
                    train,
                    *hyper,
                ),
                case(
                    aten.native_batch_norm_backward.default,
                    g,
                    x,
                    w,
                    rm,
                    rv,
                    mean,
                    rstd,
                    train,
                    1e-5,
                    [True] * 3,
                ),
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
    for name, shape in (
        ("nll_loss", (7, 5)),
        ("nll_loss", (3, 2)),
        ("nll_loss", (5,)),
        ("nll_loss2d", (3, 5, 2, 1)),
    ):
        forward, backward = (
            getattr(aten, name + "_forward").default,
            getattr(aten, name + "_backward").default,
        )
        x, c = real(*shape), shape[min(1, len(shape) - 1)]
        target = whole(c, *(shape[:1] + shape[2:] if len(shape) > 1 else ()))
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
            for name, extra in (
                ("mse_loss", ()),
                ("smooth_l1_loss", (0.5,)),
                ("huber_loss", (0.3,)),
                ("soft_margin_loss", ()),
            ):
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
    return [
        *out,
        case(aten.mse_loss.default, x, real(5), 1),
        case(aten.mse_loss_backward.default, real(), x, real(5), 1),
    ]


def _embeddings() -> list[Case]:
    out = []
    for shape, table in (
        ((3, 2), (13, 5)),
        ((7,), (16, 1)),
        ((), (3, 2)),
        ((2, 1, 3), (2, 7)),
        ((5,), (1, 3)),
    ):
        w, at = real(*table), whole(table[0], *shape)
        g = positive(*shape, table[1])
        out += [case(aten.embedding.default, w, at), case(aten.embedding.default, w, at, 1)]
        for pad, by_count in ((-1, False), (0, False), (1, True)):
            out += [case(aten.embedding_dense_backward.default, g, at, table[0], pad, by_count)]
    return out


def _bags() -> list[Case]:
    out = []
    w, at, offsets = real(7, 5), whole(7, 6), torch.tensor([0, 2, 5])
    for mode in (0, 1, 2):
        each = positive(6) if mode == 0 else None
        for op in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
            out += [case(op, w, at, offsets, False, mode), case(op, w, at, offsets, False, mode, False, each)]
        y, bag, size, most = aten._embedding_bag(w, at, offsets, False, mode, False, each)
        bag = torch.tensor([0, 0, 1, 1, 1, 2])
        out += [case(aten._embedding_bag_dense_backward.default, y, at, bag, size, most, 7, False, mode, each)]
    op = aten._embedding_bag_per_sample_weights_backward.default
    return [*out, case(op, real(3, 5), w, at, offsets, bag, 0)]


def _draws() -> list[Case]:
    x, n, p = real(5, 3), whole(9, 5, 3), positive(5, 3)
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
    out += [
        case(aten.random.default, n),
        case(aten.random.to, n, 9),
        case(getattr(aten.random, "from"), n, 2, 9),
    ]
    out += [case(aten.bernoulli.default, p), case(aten.bernoulli.Tensor, x, p), case(aten.poisson.default, p)]
    out += [case(aten.normal.Tensor_float, x, 1.0), case(aten.normal.float_Tensor, 0.0, p)]
    out += [case(aten.normal.Tensor_Tensor, x, p), case(aten.binomial.default, n.double(), p)]
    out += [case(aten._sample_dirichlet.default, p), case(aten._standard_gamma.default, p)]
    for rate, train in ((0.5, True), (0.5, None), (0.5, False), (0.0, True), (1.0, True)):
        out += [case(aten.native_dropout.default, x, rate, train)]
    for shape in ((5, 3), (6,), (2, 4, 3), ()):
        out += [case(DRAW, real(*shape), torch.tensor([77, -5]), 3, digits) for digits in (24, 53)]
    out += [case(aten.native_dropout_backward.default, p, x > 0, 2.0)]
    out += [case(aten.rrelu_with_noise_functional.default, x, p, 0.1, 0.3, training) for training in (True, False)]
    return [*out, case(aten.rrelu_with_noise_backward.default, p, x, p, 0.1, 0.3, True, False)]


CASES: list[Case] = [
    *_layer_norms(),
    *_group_norms(),
    *_batch_norms(),
    *_likelihoods(),
    *_losses(),
    *_embeddings(),
    *_bags(),
    *_draws(),
]
