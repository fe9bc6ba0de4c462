"""Operators of which torch has another form for tracing than the one it runs, where the two differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._decomp.decompositions as decompositions
from torch._C import DispatchKey

aten = torch.ops.aten
# In torch 2.13 their forms for tracing give a NaN another gradient than their kernels.
SHRINKS: tuple[Any, ...] = (aten.hardshrink.default, aten.softshrink.default)
_torch_lstm = decompositions.one_layer_lstm


@contextmanager
def as_they_run() -> Iterator[None]:
    """Within, what is traced is what runs."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(decompositions, "one_layer_lstm", _one_layer_lstm))
        for op in SHRINKS:
            stack.callback(op._dispatch_cache.clear)
            stack.enter_context(patch.dict(op.py_kernels))
            op.py_kernels.pop(DispatchKey.Autograd, None)
            op._dispatch_cache.clear()
        yield


def _one_layer_lstm(*args: Any, **kwargs: Any) -> Any:
    """torch 2.11 leaves a dim of size 1 on the last states of an LSTM when there is more than one sequence."""
    out, states = _torch_lstm(*args, **kwargs)
    return out, tuple(state.squeeze(0) if state.dim() == 3 else state for state in states)
