"""Operands for cases: numbers that are all different, and the same on every run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64

Case = tuple[Any, tuple, dict[str, Any]]


def case(op: Any, *args: Any, **kwargs: Any) -> Case:
    return op, args, kwargs


def real(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    """Numbers between low and high."""
    n = math.prod(shape)
    return (torch.arange(1, n + 1, dtype=F64) * math.sqrt(2)).frac().reshape(shape) * (high - low) + low


def positive(*shape: int) -> Tensor:
    """Numbers strictly between 0 and 1."""
    return real(*shape, low=0.05, high=0.95)


def whole(n: int, *shape: int) -> Tensor:
    """Integers from 0 to n - 1."""
    return real(*shape, low=0, high=n).long()


def mask(*shape: int) -> Tensor:
    return real(*shape) > 0


def some(n: int, *shape: int) -> Tensor:
    """The numbers 0 to n - 1 shuffled along the first dim, once for each place in the others."""
    return real(n, *shape).argsort(0)
