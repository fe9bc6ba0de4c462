"""Ranks that do not do the same are told so, all of them, at the first collective that does not pair: never a wrong
number, never a wait without end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import RankFailure, RankMismatchError, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

SOON = 6.0  # seconds: a rank looks where the others are after 2


def data_parallel(wide: int = 8) -> nn.Module:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    return shardc.compile(nn.Linear(8, wide).double(), Replicated(), mesh=mesh)


def tensor_parallel() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return shardc.compile(model, {"0": ColwiseParallel(), "2": RowwiseParallel()}, mesh=mesh)


def batch(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step), dtype=torch.double)


def train(model: nn.Module, step: int) -> None:
    model(batch(step)).square().mean().backward()


def one_forward_more(rank: int) -> None:
    model = tensor_parallel()
    train(model, 0)
    if rank:
        model(batch(7))
    train(model, 1)


def no_backward(rank: int) -> None:
    model = data_parallel()
    train(model, 0)
    y = model(batch(1))
    if not rank:
        y.sum().backward()
    train(model, 2)


def an_error_one_rank_catches(rank: int) -> None:
    model = data_parallel()
    for step in range(3):
        try:
            y = model(batch(step))
            if rank and step == 1:
                raise ValueError("a bad sample")
            y.square().mean().backward()
        except ValueError:
            continue
        if step == 1:  # rank 1 is at its next step, whose backward this one is in
            model.full_state_dict()


def two_models_in_another_order(rank: int) -> None:
    first, second = data_parallel(8), data_parallel(64)
    for model in (first, second):
        train(model, 0)
    for model in (first, second) if rank else (second, first):
        train(model, 1)


def one_step_more(rank: int) -> None:
    model = data_parallel()
    for step in range(2 + rank):
        train(model, step)


def the_norm_alone(rank: int) -> None:
    model = tensor_parallel()
    train(model, 0)
    if rank:
        model.clip_grad_norm_(1.0)
    train(model, 1)


def all_weights_alone(rank: int) -> None:
    model = tensor_parallel()
    train(model, 0)
    if rank:
        model.full_state_dict()
    train(model, 1)


def other_values(rank: int) -> None:
    model = tensor_parallel()
    train(model, 0)
    train(model, rank + 1)


KINDS = [
    one_forward_more, no_backward, an_error_one_rank_catches, two_models_in_another_order, one_step_more,
    the_norm_alone, all_weights_alone, other_values,
]  # fmt: skip
ENDS = {one_step_more: RankFailure}


def tell(rank: int, kind: Callable[[int], None]) -> tuple[str, str, float]:
    """(class of the error, its text, seconds since the ranks were last together)."""
    begin = time.monotonic()
    try:
        kind(rank)
    except (RankMismatchError, RankFailure) as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", 0.0


@on_ranks
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_are_told(kind: Callable[[int], None]):
    told = run_ranks(tell, 2, (kind,))
    said = told[1:] if kind is one_step_more else told  # the rank that ended has nothing to be told
    for name, text, seconds in said:
        assert name == ENDS.get(kind, RankMismatchError).__name__, text
        assert seconds < SOON + 10, seconds  # compiling included
        if kind is one_step_more:
            assert "rank 0 has ended" in text
        else:
            assert "rank 0: call" in text and "rank 1: call" in text and "test_out_of_step.py:" in text


def go_on(rank: int) -> list[Any]:
    """A batch that is too small on one rank: both give the step up, and the next is as if it had not been."""
    model, told = data_parallel(), []
    for step in range(4):
        mine = batch(step).chunk(2)[rank][: 1 if rank and step == 1 else 2]
        try:
            model(mine).square().mean().backward()
        except RankMismatchError as error:
            told.append(str(error).splitlines()[0])
            model.zero_grad()
    return [told, model.weight.grad]


@on_ranks
def test_after_a_step_that_all_gave_up_the_next_is_right():
    torch.manual_seed(0)
    alone = nn.Linear(8, 8).double()
    for step in (2, 3):
        alone(batch(step)).square().mean().backward()
    for told, grad in run_ranks(go_on, 2):
        assert len(told) == 1 and "inputs differ between ranks" in told[0]
        torch.testing.assert_close(grad, alone.weight.grad)


def again(rank: int) -> list[str]:
    """Each of them calls on, whatever it was told."""
    told, model = [], data_parallel()
    for step in range(4):
        try:
            y = model(batch(step))
            if step != 1 or not rank:
                y.sum().backward()
            told.append("")
        except RankMismatchError as error:
            told.append(str(error).splitlines()[0])
    return told


@on_ranks
def test_ranks_that_are_out_of_step_stay_told_so():
    for first, *rest in run_ranks(again, 2):
        assert first == "" and rest[-1] and sum(map(bool, rest)) >= 2, rest
