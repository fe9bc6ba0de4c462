"""Checks that raise on one device, as values of a program: an operator whose result nobody needs, but which stays.

    %check_linalg: i32[8] = shardc.check_linalg(%info, 'linalg.inv', True)     raises where a matrix is singular

Every rank checks all of it, so that all raise the same error and none waits for another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from shardc.compiler.rules.names import apart
from shardc.compiler.rules.table import OpRule, rule

aten = torch.ops.aten


@torch.library.custom_op("shardc::check_linalg", mutates_args=())
def check_linalg(info: Tensor, api_name: str, is_matrix: bool) -> Tensor:
    """Raises torch.linalg.LinAlgError in the name of `api_name` where `info` says that a matrix has no result."""
    aten._linalg_check_errors(info, api_name, is_matrix=is_matrix)
    return info.clone()


@check_linalg.register_fake
def _(info: Tensor, api_name: str, is_matrix: bool) -> Tensor:
    return torch.empty_like(info)


CHECK = torch.ops.shardc.check_linalg.default
has_side_effect(CHECK)  # else tracing takes it out, unused as it is


@rule(CHECK)
def _(info: Any, *_: Any, results: Any) -> OpRule:
    return apart([info], results)
