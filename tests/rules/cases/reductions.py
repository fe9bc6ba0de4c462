"""Calls that prove the rules of reductions, softmax, sorting and running sums."""

from __future__ import annotations

import math

import torch

from tests.rules.operands import F64, Case, case, real, some, whole

aten = torch.ops.aten

SHAPES = [(7, 5), (2, 1, 3), (4,), ()]

SPREADS = (aten.var, aten.std, aten.var_mean, aten.std_mean)


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


def _over_dims() -> list[Case]:
    out = []
    x, b, i = real(3, 7, 2), real(3, 7, 2) > 0.3, whole(5, 3, 7, 2)
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
    same = torch.tensor([[1.0, 3, 3, 2, 3], [-math.inf] * 5, [2, math.nan, 5, math.nan, 5]], dtype=F64)
    for y in (same, -same, same.t(), whole(3, 3, 7, 2)):
        for dim in (0, 1, None):
            out += [
                case(op, y, dim, keep) for op in (aten.argmax.default, aten.argmin.default) for keep in (True, False)
            ]
        out += [case(op, y, dim) for op in (aten.max.dim, aten.min.dim) for dim in (0, 1)]
    out += [case(aten.max.dim, b, 1), case(aten.argmax.default, real(1, 1)), case(aten.argmin.default, real())]
    out += [case(op, i, [1]) for op in (aten.sum.dim_IntList, aten.amax.default, aten.amin.default)]
    out += [case(aten.amax.default, b, [1]), case(aten.any.dim, whole(5, 3, 5).to(torch.uint8), 1)]
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
    out += [
        case(aten.norm.ScalarOpt_dtype, x.float(), 2, dtype=F64),
        case(aten.norm.ScalarOpt_dim, x, None, [0]),
    ]
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


def _sorts() -> list[Case]:
    out = []
    x = real(3, 7, 2)
    for shape, dim in (((3, 7, 2), 1), ((5, 1), -1), ((2,), 0), ((), 0)):
        x = real(*shape)
        for op in (
            aten.sort,
            aten.mode,
            aten.cumprod,
            aten.logcumsumexp,
            aten.cummax,
            aten.cummin,
            aten.cumsum,
        ):
            out += [case(op.default, x, dim)]
        out += [case(op.dim, x, dim, True) for op in (aten.median, aten.nanmedian)]
        out += [case(op.default, x) for op in (aten.median, aten.nanmedian)]
        out += [case(aten.topk.default, x, 1, dim), case(aten.kthvalue.default, x, 1, dim)]
        out += [case(aten.sort.stable, x, stable=True, dim=dim, descending=True)]
    out += [case(op.default, real(3, 5)) for op in (aten.sort, aten.mode)]
    for x in (real(3, 7, 2), some(7, 2), real(1, 3).half()):
        for k, largest in ((1, True), (2, False), (3, True)):
            out += [case(aten.topk.default, x, k, d, largest) for d in range(2) if 2 < x.shape[d] >= k]
    odd = torch.tensor([[1, -math.inf, 2, 7, 3], [math.inf, 3, math.nan, 1, 9]], dtype=F64)
    out += [case(aten.topk.default, odd, k, 1, largest) for k in (1, 4, 5) for largest in (True, False)]
    counts = whole(9, 3, 7)
    out += [case(aten.cumsum.default, y, 1) for y in (counts, counts > 4, odd, counts.to(torch.int8))]
    out += [
        case(aten.cumsum.default, counts, 0, dtype=torch.float64),
        case(aten.cumsum.default, real(2, 7), 1, dtype=torch.int64),
    ]
    out += [case(aten.cumprod.default, counts, 1), case(aten.cumprod.default, real(3, 5) + 1j, 1)]
    out += [case(aten.cumprod.default, whole(3, 2, 5).half(), 1)]
    equal = torch.tensor([[-math.inf, -math.inf, 1, 1, math.nan, 2, math.nan], [-math.inf] * 7], dtype=F64)
    for x in (equal, -equal, counts, *(real(n, 2).t() for n in (1, 2, 3, 5))):
        out += [case(op.default, x, 1) for op in (aten.cummax, aten.cummin)]
    for x in (real(2, 7), odd[:, [0, 2, 3, 4]], some(9, 2)):
        out += [case(aten.kthvalue.default, x, k, d, d == 0) for d in (0, 1) for k in (1, x.shape[d])]
        out += [case(aten.kthvalue.default, x, 2, 0 if x.shape[0] > 7 else 1)]
    rows = torch.tensor([[-math.inf, 1, -math.inf, 2], [-math.inf] * 4, [1, math.inf, 2, math.nan]], dtype=F64)
    out += [case(aten.logcumsumexp.default, rows, d) for d in (0, 1)]
    out += [case(aten.logcumsumexp.default, real(3, 5) + 1j, 1)]
    out += [case(aten.topk.default, real(5, 3), 2, 0), case(aten.topk.default, real(5, 3), 2)]
    return [*out, case(aten.kthvalue.default, real(5, 3), 2), case(aten.median.dim, real(5, 3), 1)]


CASES: list[Case] = [
    *_reductions(),
    *_over_dims(),
    *_norms_of_tensors(),
    *_softmaxes(),
    *_sorts(),
]
