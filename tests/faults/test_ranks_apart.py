"""Ranks that disagree: each of them is told what differs, soon, and no later call gives a wrong number."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan, RankMismatchError, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

SOON = 5.0  # seconds until a rank is told


class Scaled(nn.Module):
    def __init__(self, by: float, **more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.drop, self.by = nn.Linear(8, 8), nn.Dropout(0.5), torch.tensor(by)
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x)) * self.by


def told(call: Callable[[], Any]) -> str:
    """What an error of the ranks says, which came soon."""
    begin = time.monotonic()
    with pytest.raises(RankMismatchError) as caught:
        call()
    assert time.monotonic() - begin < SOON
    return str(caught.value)


def data_parallel(model: nn.Module, mesh: DeviceMesh, how: Any = None) -> shardc.CompiledModule:
    return shardc.compile(model, Plan(dp=how or Replicated()), mesh=mesh)


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def disagree(rank: int) -> dict[str, str]:
    """Faults after which all ranks have compared, and may go on."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    x, found = torch.ones(4, 8), {}
    odd = rank == 1
    more = {"b": nn.Linear(8, 8)} if odd else {}
    found["a parameter more"] = told(lambda: data_parallel(Scaled(1.0, **more), mesh))
    frozen = Scaled(1.0)
    frozen.a.bias.requires_grad_(not odd)
    found["a frozen parameter"] = told(lambda: data_parallel(frozen, mesh))
    found["another constant"] = told(lambda: data_parallel(Scaled(1.0 + rank), mesh)(x))
    found["eval on one rank"] = told(lambda: data_parallel(Scaled(1.0).train(not odd), mesh)(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=odd):
        found["autocast on one rank"] = told(lambda: data_parallel(Scaled(1.0), mesh)(x))
    with torch.set_grad_enabled(not odd):
        found["no_grad on one rank"] = told(lambda: data_parallel(Scaled(1.0), mesh)(x))
    held = data_parallel(Scaled(1.0), mesh)
    with held.no_sync() if odd else nullcontext():
        found["no_sync on one rank"] = told(lambda: held(x))
    compiled = data_parallel(Scaled(1.0), mesh)
    compiled.check_replicas()
    with torch.no_grad():
        compiled.a.bias[3] += rank
    found["an edited weight"] = told(compiled.check_replicas)
    sharded = data_parallel(Scaled(1.0), mesh, FullyShard())
    with torch.no_grad():
        sharded.a.weight.to_local().add_(rank)
    sharded.check_replicas()  # of what each rank holds alone there is no replica
    step(compiled, x)  # what was refused left nothing under way
    return found


@on_ranks
def test_ranks_that_differ_are_told_in_what():
    first, second = run_ranks(disagree, 2)
    assert first == second
    assert "b.weight: torch.float32[8, 8] requires grad" in first["a parameter more"]
    assert "rank 1: a.bias: torch.float32[8]" in first["a frozen parameter"]
    assert "value of by: torch.float32[]" in first["another constant"]
    assert "rank 0: in eval mode: none" in first["eval on one rank"]
    assert "rank 1: in eval mode: all" in first["eval on one rank"]
    assert "rank 1: autocast: cpu to torch.bfloat16" in first["autocast on one rank"]
    assert "rank 1: gradients: off (no_grad)" in first["no_grad on one rank"]
    assert "rank 1: not reduced (no_sync): a.weight, a.bias" in first["no_sync on one rank"]
    assert "a.bias: torch.float32[8]" in first["an edited weight"]


def fall_out(rank: int) -> str:
    """The last rank is in eval mode after steps that were right; the others wait in a collective."""
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("dp",))
    compiled = data_parallel(Scaled(1.0), mesh, FullyShard())
    x = torch.ones(4, 8)
    step(compiled, x)
    step(compiled, x[:2])
    step(compiled, x)

    def apart() -> None:
        compiled.train(rank != 2)
        step(compiled, x)

    found = told(apart)
    compiled.train()
    step(compiled, x)  # all gave that step up
    return found


@on_ranks
def test_of_several_ranks_that_wait_for_another_each_is_told():
    for text in run_ranks(fall_out, 3):
        assert "inputs differ between ranks" in text and "rank 2 was called" in text, text


def one_more_row(rank: int) -> None:
    """An error in the second part of an accumulated step that all ranks drop."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    alone = copy.deepcopy(model)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square().mean()

    sgd = partial(torch.optim.SGD, lr=0.1)
    train = shardc.train_step(model, Plan(dp=Replicated()), loss, sgd, mesh=mesh, accumulate=2)
    whole, seen = train._gradients, []
    batches = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))

    def failing(batch: Any) -> Any:
        seen.append(batch)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return whole(batch)

    train(batches[0].chunk(2)[rank])
    train._gradients = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        train(batches[1].chunk(2)[rank])
    train._gradients = whole
    train(batches[2].chunk(2)[rank])
    optimizer = sgd(alone.parameters())
    for i in (0, 2):
        loss(alone, batches[i]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.weight.detach(), alone.weight.detach())


@on_ranks
def test_an_accumulated_step_that_failed_leaves_nothing_behind():
    run_ranks(one_more_row, 2)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("strange", [20, -1, -20, 10**12])
def test_an_index_that_no_rank_owns_is_an_error_as_on_one_device(tp: int, strange: int):
    table = nn.Embedding(20, 4)
    ids = torch.tensor([[1, 19], [0, strange]])
    alone = copy.deepcopy(table)
    compiled = shardc.compile(table, RowwiseParallel(), mesh=Mesh(tp=tp))
    torch.testing.assert_close(compiled(ids[:1]), alone(ids[:1]))
    for model in (alone, compiled):
        with pytest.raises(IndexError, match="index out of range"):
            model(ids)


def test_an_unsplit_vocabulary_is_looked_up_by_torch_alone():
    compiled = shardc.compile(nn.Embedding(20, 4), ColwiseParallel(), mesh=Mesh(tp=2))
    compiled(torch.tensor([1, 19]))
    assert "aten.ge" not in str(compiled.programs[-1])
