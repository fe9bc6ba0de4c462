"""Run a function of a test module on real gloo ranks, never for longer than a test may take."""

from collections.abc import Callable, Sequence
from typing import Any

from shardc.runtime.launch import launch

LIMIT = 50.0  # seconds, start included: under the 60 that pytest gives such a test


def run_ranks(fn: Callable[..., Any], nproc: int, args: Sequence[Any] = (), limit: float = LIMIT) -> list[Any]:
    """The results of `fn(rank, *args)` on nproc ranks. fn stands at the top level of the test's module."""
    return launch(fn, nproc, args, timeout=limit)
