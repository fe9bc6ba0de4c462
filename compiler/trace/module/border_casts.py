"""Floating-point tensors are cast where they enter a module that computes in another dtype, as FSDP2 casts them.

A value between two modules may be wider than their parameters: an activation times a table in single precision, say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn


@contextmanager
def casting(module: nn.Module, casts: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inputs of the modules of these names arrive in these dtypes. Scripted modules take no hooks and are left out."""
    with ExitStack() as stack:
        for fqn, dtype in casts.items():
            owner = module.get_submodule(fqn)
            if not isinstance(owner, torch.jit.ScriptModule):
                stack.callback(owner.register_forward_pre_hook(_hook(dtype), with_kwargs=True).remove)
        yield


def _hook(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return (cast(args[0]),), kwargs
        return pytree.tree_map(cast, (args, kwargs))

    return before
