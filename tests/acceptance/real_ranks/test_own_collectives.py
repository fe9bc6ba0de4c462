"""Collectives that forward calls itself, in every spelling: the program is written for the global batch, so each is
refused while tracing, with its line, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardc
from tests.runtime.ranks import on_ranks, run_ranks


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def counted(y: Tensor) -> Tensor:
    rows = torch.tensor(float(y.shape[0]))
    dist.all_reduce(rows)
    return y / rows


def reduced(y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y


def gathered(y: Tensor) -> Tensor:
    pieces = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(pieces, y)
    return torch.cat(pieces)


def broadcast(y: Tensor) -> Tensor:
    dist.broadcast(y, 0)
    return y


def waited(y: Tensor) -> Tensor:
    dist.barrier()
    return y


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda y: funcol.all_reduce(y, "sum", dist.group.WORLD),  # pyright: ignore[reportArgumentType]
    "in an autograd function": Summed.apply,
    "of a count": counted,
    "in place": reduced,
    "gathered": gathered,
    "broadcast": broadcast,
    "barrier": waited,
}


class Asks(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.way = nn.Linear(4, 4), WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.up(x))


def on_two(rank: int) -> dict[str, str]:
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), {}
    for way in WAYS:
        compiled = shardc.compile(Asks(way), shardc.Replicated(), mesh=mesh)
        try:
            compiled(torch.randn(2, 4))
            found[way] = "ran"
        except shardc.ShardingError as error:
            found[way] = str(error)
    return found


@on_ranks
def test_a_collective_of_the_users_own_is_refused_by_name_and_line():
    first, second = run_ranks(on_two, 2)
    assert first == second
    for way, text in first.items():
        assert "forward calls the collective" in text and "--> test_own_collectives.py:" in text, (way, text)
        assert "leave the collective out" in text, (way, text)
