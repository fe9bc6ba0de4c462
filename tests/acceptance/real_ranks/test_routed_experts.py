"""Routed experts on real gloo ranks: each rank sorts its own rows, and trains as one device does on all."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import shardc
from tests.acceptance.test_rows_by_origin import WIDTH, Routed
from tests.runtime.ranks import on_ranks, run_ranks


def train(rank: int, ranks: int, bias: float) -> list[str]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    mine, alone = Routed(bias=bias), Routed(bias=bias)
    alone.load_state_dict(mine.state_dict())
    compiled = shardc.compile(mine, shardc.Replicated(), mesh=mesh)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (compiled, alone))
    for _ in range(5):
        whole = torch.randn(8, WIDTH, dtype=torch.float64)
        loss = compiled(whole.chunk(ranks)[rank]).square().mean()
        loss.backward()
        alone(whole).square().mean().backward()
        for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(grad, q.grad, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert compiled.programs[-1].work().repeated == 1.0
    return sorted({c.kind for c in compiled.programs[-1].collectives()})


@on_ranks
@pytest.mark.parametrize(("ranks", "bias"), [(2, 0.0), (4, 50.0)])
def test_experts_train_as_on_one_device(ranks: int, bias: float):
    """With four ranks all rows go to one expert first, and the others get none."""
    assert run_ranks(train, ranks, (ranks, bias)) == ranks * [["all_reduce"]]
