"""Parameters that gave way to their shards: an optimizer that was made before goes on with what came in their place."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardc.compiler.errors import PlanError

# An attribute of the parameter that is gone: it lives as long as somebody holds that. (A weak reference to a tensor
# keeps torch from swapping it, as lowering and loading do.)
BECAME = "_shardc_became"


def replaced(old: Any, new: Any) -> None:
    """Remember what a parameter gave way to."""
    if isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter) and old is not new:
        _follow_from_now_on()
        setattr(old, BECAME, new)


def newest(x: Tensor) -> Tensor:
    """What a parameter is by now: itself, where nothing came in its place."""
    while (later := getattr(x, BECAME, None)) is not None:
        x = later
    return x


@cache
def _follow_from_now_on() -> None:
    register_optimizer_step_pre_hook(_follow)


def _follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step of any optimizer."""
    for group in optimizer.param_groups:
        for i, x in enumerate(group["params"]):
            if (now := newest(x)) is x:
                continue
            if optimizer.state.get(x):
                raise PlanError(
                    f"this {type(optimizer).__name__} has made steps on a parameter of shape {list(x.shape)} that "
                    "compile has since put in pieces",
                    help="make the optimizer after compile, of the compiled module's parameters",
                )
            group["params"][i] = now
