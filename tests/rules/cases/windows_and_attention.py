"""Calls that prove the rules of convolution, pooling, resampling and attention."""

from __future__ import annotations

import math

import torch

import tests.rules.stand_ins  # noqa: F401
from tests.rules.operands import Case, case, positive, real, whole

aten = torch.ops.aten


def _convolutions() -> list[Case]:
    """One to three spatial dims, with and without groups, as they are and transposed, in strides of two."""
    out = []
    shapes = [
        ((3, 5, 6), (7, 5, 2), 1, False),
        ((2, 4, 6), (6, 2, 3), 2, False),
        ((2, 3, 5), (3, 1, 2), 3, False),
        ((3, 5, 4), (5, 3, 2), 1, True),
        ((2, 6, 4), (6, 2, 2), 3, True),
        ((2, 3, 5, 4), (4, 3, 2, 2), 1, False),
        ((1, 2, 3, 4), (2, 3, 2, 2), 1, True),
        ((2, 2, 3, 4, 3), (3, 2, 2, 2, 1), 1, False),
    ]
    for left, right, groups, transposed in shapes:
        x, w, k = real(*left), real(*right).flip(0), len(left) - 2
        o = right[1] * groups if transposed else right[0]
        how = ([2] * k, [1] * k, [1] * k, transposed, [0] * k, groups)
        for bias in (None, real(o)):
            y = aten.convolution(x, w, bias, *how)
            mask = [True, True, bias is not None]
            out += [case(aten.convolution.default, x, w, bias, *how)]
            out += [case(aten.convolution_backward.default, y * y, x, w, [o], *how, mask)]
        out += [case(aten.convolution_backward.default, y * y, x, w, None, *how, [False, True, False])]
    return out


def _convolutions_of_rows() -> list[Case]:
    """Sizes that split unevenly, strides, paddings and dilations; kernels that reach beyond a neighbour."""
    out = []
    for size, kernel, stride, padding, dilation in (
        ((7,), (3,), 1, 1, 1), ((9,), (3,), 2, 1, 1), ((11,), (5,), 1, 2, 1), ((7,), (3,), 1, 2, 2),
        ((5, 4), (3, 3), 1, 1, 1), ((8, 7), (3, 1), 2, 1, 2), ((4, 6), (1, 3), 1, 0, 1), ((9, 4), (7, 2), 1, 3, 1),
    ):  # fmt: skip
        k = len(size)
        x, w, b = real(2, 3, *size), real(4, 3, *kernel), real(4)
        how = ([stride] * k, [padding] * k, [dilation] * k, False, [0] * k, 1)
        y = aten.convolution(x, w, b, *how)
        out += [case(aten.convolution.default, x, w, b, *how), case(aten.convolution.default, x, w, None, *how)]
        for mask in ([True] * 3, [True, False, False], [False, True, True]):
            out += [case(aten.convolution_backward.default, y.cos(), x, w, [4], *how, mask)]
    return out + _transposed_rows()


def _transposed_rows() -> list[Case]:
    """As many rows as there may be ranks, fewer and more; strides beyond the kernel, rows added at the end."""
    out = []
    for size, kernel, stride, padding, dilation, added in (
        ((1,), (3,), 1, 0, 1, 0), ((2,), (2,), 3, 0, 1, 1), ((3,), (3,), 2, 1, 1, 1), ((7,), (3,), 2, 1, 2, 0),
        ((5, 2), (3, 2), 2, 1, 1, 1),
    ):  # fmt: skip
        k = len(size)
        x, w, b = real(2, 4, *size), real(4, 2, *kernel), real(4)
        how = ([stride] * k, [padding] * k, [dilation] * k, True, [added] * k, 2)
        y = aten.convolution(x, w, b, *how)
        out += [case(aten.convolution.default, x, w, b, *how)]
        for mask in ([True] * 3, [False, True, False]):
            out += [case(aten.convolution_backward.default, y.cos(), x, w, [4], *how, mask)]
    return out


def _pools() -> list[Case]:
    out = []
    for lead in ((3, 5), (2, 1), (7,)):
        x1, x2, x3 = real(*lead, 6), real(*lead, 4, 6), real(*lead, 4, 6, 4)
        for k, x in ((2, x2), (3, x3)):
            two = [2] * k
            pool, back = (getattr(aten, f"avg_pool{k}d{b}").default for b in ("", "_backward"))
            out += [case(pool, x, two), case(back, pool(x, two), x, two, two, [0] * k, False, True, None)]
            pool, back = (getattr(aten, f"_adaptive_avg_pool{k}d{b}").default for b in ("", "_backward"))
            out += [case(pool, x, two), case(back, pool(x, two), x)]
            pool, back = (getattr(aten, f"max_pool{k}d_with_indices{b}").default for b in ("", "_backward"))
            y, at = pool(x, two)
            out += [case(pool, x, two), case(back, y, x, two, two, [0] * k, [1] * k, False, at)]
            unpool = getattr(aten, f"max_unpool{k}d").default
            out += [case(unpool, y, at, list(x.shape[-k:]), *([two, [0] * k] if k == 3 else []))]
            pool, back = (getattr(aten, f"adaptive_max_pool{k}d{b}").default for b in ("", "_backward"))
            y, at = pool(x, two)
            out += [case(pool, x, two), case(back, y, x, at)]
        for k, x in ((1, x1), (2, x2), (3, x3)):
            for kind in ("reflection", "replication"):
                pad, back = (getattr(aten, f"{kind}_pad{k}d{b}").default for b in ("", "_backward"))
                ends = [1] * (2 * k)
                out += [case(pad, x, ends), case(back, pad(x, ends), x, ends)]
    return out


def _pools_of_rows() -> list[Case]:
    """Strides below, at and beyond the kernel, paddings, dilations, windows that go beyond the image."""
    out, low = [], -math.inf
    for size, kernel, stride, padding, dilation, ceil in (
        ((1, 1), 1, 1, 0, 1, False), ((2, 5), 2, 1, 1, 1, False), ((3, 7), 3, 2, 1, 1, True),
        ((7, 2), 2, 3, 0, 1, True), ((7, 7), 2, 1, 1, 2, False), ((5, 3, 2), 2, 2, 1, 1, True),
    ):  # fmt: skip
        k = len(size)
        x, how = real(2, 3, *size), ([kernel] * k, [stride] * k, [padding] * k)
        for y in (x[1], x):
            pool, back = (getattr(aten, f"max_pool{k}d_with_indices{b}").default for b in ("", "_backward"))
            rest = ([dilation] * k, ceil)
            value, at = pool(y, *how, *rest)
            out += [case(pool, y, *how, *rest), case(back, value.cos(), y, *how, *rest, at)]
            pool, back = (getattr(aten, f"avg_pool{k}d{b}").default for b in ("", "_backward"))
            for rest in ((ceil, True, None), (ceil, False, None), (ceil, False, 3)):
                out += [case(pool, y, *how, *rest), case(back, pool(y, *how, *rest).cos(), y, *how, *rest)]
    image = torch.full((2, 1, 7, 5), low)
    image[0, 0, 2, 1] = image[1, 0, 5, 3] = math.nan
    out += [case(aten.max_pool2d_with_indices.default, image, [3, 2], [2, 1], [1, 1], [d, d]) for d in (1, 2)]
    return out + _pools_of_counts()


def _pools_of_counts() -> list[Case]:
    """Windows of 3 and of 4 elements, whose ratio no float holds; integers, whose averages are rounded down."""
    x, n = real(1, 2, 7, 4), whole(99, 1, 2, 7, 4) - 50
    how = ([4, 1], [1, 1], [1, 0], False, False)
    counted = [case(aten.avg_pool2d.default, y, *how) for y in (x, n)]
    deep = [case(aten.avg_pool3d.default, y[None], [1, 4, 1], [1, 1, 1], [0, 1, 0], False, False) for y in (x, n)]
    back = case(aten.avg_pool2d_backward.default, aten.avg_pool2d(x, *how), x, *how, None)
    return [*counted, *deep, back, case(aten.max_pool2d_with_indices.default, n, [3, 1], [1, 1], [1, 0])]


def _resampled() -> list[Case]:
    out = []
    corners = ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    names = [*(f"upsample_{n}" for n in corners), "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
    names += [f"{n}{k}d" for n in ("upsample_nearest", "_upsample_nearest_exact") for k in (1, 2, 3)]
    for name in names:
        k = next(int(c) for c in name if c.isdigit())
        x, size = real(3, 5, *([3] * k)), [5, 4, 6][:k]
        flag = () if "nearest" in name else (False,)
        y = getattr(aten, name).default(x, size, *flag)
        out += [case(getattr(aten, name).default, x, size, *flag)]
        out += [case(getattr(aten, name + "_backward").default, y, size, list(x.shape), *flag)]
    pixels = whole(120, 1, 2, 5, 4).to(torch.uint8)
    out += [case(getattr(aten, f"upsample_bi{n}2d").default, pixels, [9, 7], False) for n in ("linear", "cubic")]
    x = real(3, 5, 4, 6)
    square = [2, 2], [1, 1], [0, 0], [1, 1]
    for image in (x, x[0]):
        y = aten.im2col(image, *square)
        out += [case(aten.im2col.default, image, *square), case(aten.col2im.default, y, [4, 6], *square)]
    out += [case(aten.pixel_shuffle.default, real(2, 12, 2, 3), 2), case(aten.pixel_unshuffle.default, x, 2)]
    out += [case(aten.channel_shuffle.default, real(2, 10, 3), 2)]
    for k, image in ((2, x), (3, real(2, 3, 4, 3, 2))):
        grid = real(image.shape[0], *([3, 2, 1][:k]), k) / 2
        sample, back = (getattr(aten, f"grid_sampler_{k}d{b}").default for b in ("", "_backward"))
        y = sample(image, grid, 0, 0, False)
        out += [case(sample, image, grid, 0, 0, False)]
        out += [case(back, y, image, grid, 0, 0, False, m) for m in ([True, True], [False, True], [True, False])]
    return out


def _attentions() -> list[Case]:
    out = []
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for b, heads, groups, rows in ((3, 5, 5, 7), (2, 6, 3, 2), (1, 1, 1, 1), (2, 4, 2, 3)):
        q, k, v = real(b, heads, rows, 4), real(b, groups, 5, 4), positive(b, groups, 5, 4)
        masks = [(rows, 5), (b, 1, rows, 5), (1, heads, 1, 5), (b, heads, rows, 5)]
        for causal, shape in ((False, None), (True, None), *((False, m) for m in masks)):
            options = {"attn_mask": real(*shape)} if shape else {}
            y, lse = forward(q, k, v, 0.0, causal, **options)
            out += [case(forward, q, k, v, 0.0, causal, **options)]
            out += [case(backward, positive(*y.shape), q, k, v, y, lse, 0.0, causal, **options)]
    return [*out, case(forward, q, k, v, scale=0.5)]


def _on_accelerators() -> list[Case]:
    out = []
    x, norm = real(3, 2, 5), [2, 5]
    rstd = aten._fused_rms_norm(x, norm, None, 1e-5)[1]
    for w, mask in ((positive(*norm), [True, True]), (None, [True, False]), (positive(*norm), [False, True])):
        out += [case(aten._fused_rms_norm_backward.default, positive(3, 2, 5), x, norm, rstd, w, mask)]
    for shape in ((5, 3), (4, 2, 7)):
        x, c = real(*shape), shape[1]
        w, kept = positive(c), torch.zeros(7, dtype=torch.uint8)
        op, back = aten.cudnn_batch_norm.default, aten.cudnn_batch_norm_backward.default
        out += [case(op, x, w, real(c), None, None, True, 0.1, 1e-5)]
        out += [case(op, x, w, real(c), real(c), positive(c), training, 0.0, 1e-5) for training in (True, False)]
        out += [case(back, x, positive(*shape), w, None, None, real(c), positive(c), 1e-5, kept)]
    names = [f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")]
    flash, efficient, cudnn = (getattr(aten, name).default for name in names)
    flash_back, efficient_back, cudnn_back = (getattr(aten, name + "_backward").default for name in names)
    for b, heads, groups in ((3, 5, 5), (2, 6, 3)):
        q, k, v = real(b, heads, 3, 4), real(b, groups, 5, 4), positive(b, groups, 5, 4)
        g = positive(b, heads, 3, 4)
        for causal, shape in (
            (False, None),
            (True, None),
            (False, (b, heads, 3, 5)),
            (False, (1, heads, 3, 5)),
        ):
            bias = real(*shape) if shape else None
            y, lse, seed, offset = efficient(q, k, v, bias, True, 0.0, causal)
            grads = [True, True, True, bias is not None]
            out += [case(efficient, q, k, v, bias, wanted, 0.0, causal) for wanted in (True, False)]
            out += [case(efficient_back, g, q, k, v, bias, y, lse, seed, offset, 0.0, grads, causal)]
            saved = cudnn(q, k, v, bias, True, 0.0, causal)
            out += [case(cudnn, q, k, v, bias, True, 0.0, causal)]
            out += [case(cudnn_back, g, q, k, v, *saved[:2], seed, offset, bias, None, None, 3, 5, 0.0, causal)]
            if bias is None:
                out += [case(flash, q, k, v, 0.0, causal)]
                out += [case(flash_back, g, q, k, v, y, lse[:, :, :3], None, None, 3, 5, 0.0, causal, seed, offset)]
    return out


CASES: list[Case] = [
    *_convolutions(),
    *_convolutions_of_rows(),
    *_pools(),
    *_pools_of_rows(),
    *_resampled(),
    *_attentions(),
    *_on_accelerators(),
]
