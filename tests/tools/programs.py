"""Programs to look at: a small one with every kind of thing in it."""

from __future__ import annotations

import functools
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan, Program, Replicated


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def target() -> tuple[nn.Module, Plan, tuple[Tensor]]:
    """What `shardc view tests/tools/programs.py:target` shows."""
    return Net(), plan(), (torch.zeros(8, 4, dtype=torch.long),)


def plan(sharded: bool = False) -> Plan:
    tp = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    return Plan(dp=FullyShard("layers.*") if sharded else Replicated(), tp=tp)


@cache
def program(sharded: bool = False, recompute: str | None = None) -> Program:
    """Net on dp=2 x tp=2, made once; sharded: with FullyShard over dp."""
    compiled = shardc.compile(Net(), plan(sharded), mesh=Mesh(dp=2, tp=2), recompute=recompute)
    return compiled.lower(torch.zeros(8, 4, dtype=torch.long))


LARGE = 2**20  # a side: no machine holds such a matrix


def on_meta() -> tuple[nn.Module, Plan, tuple[Tensor], dict]:
    """A model that nobody can allocate, without `reset_parameters`, and what compile is told beside the plan."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(LARGE, LARGE, bias=False), nn.ReLU(), nn.Linear(LARGE, 8))
        model.register_buffer("scale", torch.ones(LARGE))
        inputs = (torch.empty(64, LARGE),)
    precision = shardc.Precision(param=torch.bfloat16)
    return model, Plan(dp=FullyShard("*")), inputs, {"precision": precision, "recompute": "1"}


def deferred() -> tuple[nn.Module, Plan, tuple[Tensor]]:
    """The same, as deferred_init builds it."""
    build = functools.partial(nn.Linear, LARGE, LARGE)
    return shardc.deferred_init(build), Plan(dp=FullyShard()), (torch.empty(64, LARGE, device="meta"),)
