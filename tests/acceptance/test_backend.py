"""`backend=`: what is computed between collectives goes through torch.compile, and comes out the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Plan
from tests.runtime.ranks import on_ranks, run_ranks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer())


def plan() -> Plan:
    return Plan(dp=FullyShard("*"), tp={"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})


def trained(model: nn.Module, rows: tuple[int, ...], device_mesh) -> list[Tensor]:
    """Outputs and whole gradients over calls of several sizes, the first again at the end."""
    found = []
    for n in rows:
        model.zero_grad()
        x = torch.arange(8.0 * n).view(n, 8).cos()
        out = model(x)
        out.square().sum().backward()
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
        found += [out.detach(), *grads]
    return found


def compared(rank: int, backend: str | Callable, rows: tuple[int, ...]) -> int:
    mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()), mesh_dim_names=("dp", "tp"))
    calls: list[int] = []

    def counting(gm, inputs):
        calls.append(len(list(gm.graph.nodes)))
        return gm.forward

    eager = trained(shardc.compile(net(), plan(), mesh=mesh), rows, mesh)
    other = shardc.compile(net(), plan(), mesh=mesh, backend=counting if backend == "counting" else backend)
    for have, want in zip(trained(other, rows, mesh), eager, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    return len(calls)


@on_ranks
def test_any_backend_of_torch_compile_gets_the_stretches_between_collectives():
    assert run_ranks(compared, 2, ("counting", (4, 6, 4)))[0] > 4


@on_ranks
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_what_eager_gives():
    run_ranks(compared, 1, ("inductor", (4,)))  # collectives over one rank part stretches all the same


@pytest.mark.parametrize("backend", ["", "tvm", None, 3])
def test_another_backend_is_refused(backend):
    with pytest.raises(shardc.PlanError, match="backend"):
        shardc.compile(net(), plan(), mesh=shardc.Mesh(dp=1, tp=2), backend=backend)
