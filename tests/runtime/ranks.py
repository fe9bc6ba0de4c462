"""Run a function of a test module on real gloo ranks, never for longer than a test may take.

SHARDC_RANKS_LIMIT gives more seconds on a machine that is busy with other things: SHARDC_RANKS_START=spawn
starts each rank as a new process that imports torch, as `launch` does by itself.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from shardc.runtime.launch.launch import launch

LIMIT = float(os.environ.get("SHARDC_RANKS_LIMIT", "120"))
START: Any = os.environ.get("SHARDC_RANKS_START", "forkserver")


def on_ranks(test: Callable) -> Callable:
    """Marks a test that starts ranks, and gives it a little more time than they have, to see how they ended."""
    return pytest.mark.ranks(pytest.mark.timeout(LIMIT + 10)(test))


def run_ranks(fn: Callable[..., Any], nproc: int, args: Sequence[Any] = (), limit: float = LIMIT) -> list[Any]:
    """The results of `fn(rank, *args)` on nproc ranks. fn stands at the top level of the test's module."""
    return launch(fn, nproc, args, timeout=limit, start=START)
