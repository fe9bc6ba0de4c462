"""Checks that raise on one device, as values of a program: operators whose result nobody needs, but which stay.

    %check_linalg: i32[8] = shardc.check_linalg(%info, 'linalg.inv', True)     raises where a matrix is singular
    %check_true: bool[] = shardc.check_true(%all, 'ValueError', 'var has ...')  raises where it is false

Every rank checks all of it, so that all raise the same error and none waits for another.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from shardc.compiler.rules.notation import apart
from shardc.compiler.rules.table import OpRule, rule

aten = torch.ops.aten


@torch.library.custom_op("shardc::check_linalg", mutates_args=())
def check_linalg(info: Tensor, api_name: str, is_matrix: bool) -> Tensor:
    """Raises torch.linalg.LinAlgError in the name of `api_name` where `info` says that a matrix has no result."""
    aten._linalg_check_errors(info, api_name, is_matrix=is_matrix)
    return info.clone()


@torch.library.custom_op("shardc::check_true", mutates_args=())
def check_true(holds: Tensor, error: str, message: str) -> Tensor:
    """Raises the built-in exception of that name where a bool without dims is false."""
    if not holds:
        raise getattr(builtins, error)(message)
    return holds.clone()


@check_linalg.register_fake
@check_true.register_fake
def _(value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value)


CHECK = torch.ops.shardc.check_linalg.default
CHECK_TRUE = torch.ops.shardc.check_true.default
CHECKS = (CHECK, CHECK_TRUE)
for _op in CHECKS:
    has_side_effect(_op)  # else tracing takes it out, unused as it is


@rule(CHECK)
@rule(CHECK_TRUE)
def _(value: Any, *_: Any, results: Any) -> OpRule:
    return apart([value], results)
