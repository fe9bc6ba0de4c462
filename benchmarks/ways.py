"""Every way to run one parallelism that step_time.py compares: a name, and how to make a step of it.

A step takes this rank's part of a batch and does everything from clearing gradients to the last of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import floors
import torch
from models.gpt import GPT, loss_of, tensor_parallel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardc
from shardc import FullyShard, Plan, Replicated

Step = Callable[[Tensor, Tensor], Any]
Way = Callable[[GPT, DeviceMesh, int, int], Step]
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)
UNITS = ("blocks.*",)


def step_of(model: torch.nn.Module, run: Callable[[Tensor], Tensor] | None = None, optimizer: Any = None) -> Step:
    call = model if run is None else run
    made = optimizer(list(model.parameters())) if optimizer is not None else None

    def step(x: Tensor, y: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(call(x), y)
        loss.backward()
        if made is not None:
            made.step()
        return loss

    return step


def _dtensor(model: GPT, mesh: DeviceMesh, backend: str = "", optimizer: Any = None) -> Step:
    sharded = parallelize_module(model, mesh, tensor_parallel())
    return step_of(sharded, torch.compile(sharded, backend=backend) if backend else None, optimizer)


def _ddp(model: GPT, backend: str = "") -> Step:
    wrapped = DistributedDataParallel(model)
    return step_of(wrapped, torch.compile(wrapped, backend=backend) if backend else None)


def _fsdp2(model: GPT, mesh: DeviceMesh, backend: str = "") -> Step:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return step_of(model, torch.compile(model, backend=backend) if backend else None)


def _shardc(model: GPT, plan: Plan, mesh: DeviceMesh, **options: Any) -> Step:
    return step_of(shardc.compile(model, plan, mesh=mesh, **options))


def _train_step(model: GPT, plan: Plan, mesh: DeviceMesh, **options: Any) -> Step:
    return shardc.train_step(model, plan, lambda m, x, y: loss_of(m(x), y), ADAMW, mesh=mesh, **options)


TP, DP = Plan(tp=tensor_parallel()), Plan(dp=Replicated())
FSDP = Plan(dp=FullyShard(*UNITS))

WAYS: dict[str, Way] = {
    "tp dtensor": lambda m, mesh, r, n: _dtensor(m, mesh),
    "tp dtensor aot_eager": lambda m, mesh, r, n: _dtensor(m, mesh, "aot_eager"),
    "tp dtensor inductor": lambda m, mesh, r, n: _dtensor(m, mesh, "inductor"),
    "tp dtensor + optim": lambda m, mesh, r, n: _dtensor(m, mesh, optimizer=ADAMW),
    "tp shardc": lambda m, mesh, r, n: _shardc(m, TP, mesh),
    "tp shardc inductor": lambda m, mesh, r, n: _shardc(m, TP, mesh, backend="inductor"),
    "tp shardc train_step": lambda m, mesh, r, n: _train_step(m, TP, mesh),
    "tp floor": lambda m, mesh, r, n: floors.tensor_parallel(m, r, n),
    "dp ddp": lambda m, mesh, r, n: _ddp(m),
    "dp ddp inductor": lambda m, mesh, r, n: _ddp(m, "inductor"),
    "dp shardc": lambda m, mesh, r, n: _shardc(m, DP, mesh),
    "dp shardc inductor": lambda m, mesh, r, n: _shardc(m, DP, mesh, backend="inductor"),
    "dp floor": lambda m, mesh, r, n: floors.data_parallel(m, r, n),
    "fsdp fsdp2": lambda m, mesh, r, n: _fsdp2(m, mesh),
    "fsdp fsdp2 inductor": lambda m, mesh, r, n: _fsdp2(m, mesh, "inductor"),
    "fsdp shardc": lambda m, mesh, r, n: _shardc(m, FSDP, mesh),
    "fsdp shardc inductor": lambda m, mesh, r, n: _shardc(m, FSDP, mesh, backend="inductor"),
    "fsdp floor": lambda m, mesh, r, n: floors.fully_sharded(m, r, n),
}


def given(name: str, batch: tuple[Tensor, Tensor], rank: int, world: int) -> tuple[DeviceMesh, tuple[Tensor, Tensor]]:
    """The mesh of a way, and this rank's part of a batch: all of it under tensor parallelism, else its rows."""
    tensor = name.startswith("tp ")
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp" if tensor else "dp",))
    x, y = batch
    return mesh, batch if tensor else (x.chunk(world)[rank].clone(), y.chunk(world)[rank].clone())


def make(name: str, model: GPT, mesh: DeviceMesh, rank: int, world: int) -> Step:
    """The step of one way, on a copy of the model."""
    return WAYS[name](copy.deepcopy(model), mesh, rank, world)
