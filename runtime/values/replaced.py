"""Parameters that gave way to their shards: an optimizer that was made before goes on with what came in their place."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardc.compiler.errors import PlanError

# By identity: tensors compare by their values. The first keeps no parameter alive, and tells a number used again.
_NEXT: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}


def replaced(old: Any, new: Any) -> None:
    """Remember what a parameter gave way to."""
    if isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter) and old is not new:
        if not _NEXT:
            register_optimizer_step_pre_hook(_follow)
        key = id(old)
        _NEXT[key] = weakref.ref(old, lambda _: _NEXT.pop(key, None)), weakref.ref(new)


def newest(x: Tensor) -> Tensor:
    """What a parameter is by now: itself, where nothing came in its place."""
    while id(x) in _NEXT:
        old, new = _NEXT[id(x)]
        later = new()
        if old() is not x or later is None:
            return x
        x = later
    return x


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
