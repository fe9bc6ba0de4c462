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


CASES: list[Case] = [*_reductions(), *_over_dims(), *_norms_of_tensors()]
