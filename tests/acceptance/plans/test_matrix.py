"""Every way to lay a model out x recomputation x precision: five training steps equal one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.func import functional_call

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, Precision, Replicated
from tests.acceptance.models import Block
from tests.acceptance.plans.test_sequence_parallel import BLOCK_SP

pytestmark = pytest.mark.slow

TP = {
    **{f"layers.*.{name}": ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v", "up")},
    **{f"layers.*.{name}": RowwiseParallel() for name in ("attn.proj", "down")},
}
SP = {f"layers.*.{name}": style for name, style in BLOCK_SP.items()}
SLICES = {"inputs": Layout(tp=Shard(1)), "outputs": Layout(tp=Shard(1))}
DP, FSDP = Replicated(), FullyShard("layers.*")
ROWS: dict[str, tuple[Any, Mesh, dict[str, Any]]] = {
    "none": (Plan(tp={"nothing": ColwiseParallel()}), Mesh(tp=1), {}),
    "TP": (Plan(tp=TP), Mesh(tp=2), {}),
    "SP": (Plan(tp=SP), Mesh(tp=2), SLICES),
    "DP": (Plan(dp=DP), Mesh(dp=2), {}),
    "FSDP": (Plan(dp=FSDP), Mesh(dp=2), {}),
    "HSDP": (Plan(replica=DP, dp=FSDP), Mesh(replica=2, dp=2), {}),
    "FSDP+TP": (Plan(dp=FSDP, tp=TP), Mesh(dp=2, tp=2), {}),
    "DP+TP": (Plan(dp=DP, tp=TP), Mesh(dp=2, tp=2), {}),
    "HSDP+TP": (Plan(replica=DP, dp=FSDP, tp=TP), Mesh(replica=2, dp=2, tp=2), {}),
}
SHORT = Precision(param=torch.bfloat16, reduce=torch.float32)
# Of short floats each rank rounds its own partial sums: losses then differ by roundings, and no more.
CLOSE = {None: {"rtol": 2e-5, "atol": 1e-5}, SHORT: {"rtol": 2e-2, "atol": 1e-2}}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8, 2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def one_device(model: nn.Module, precision: Precision | None, x: Tensor) -> Tensor:
    if precision is None:
        return model(x)
    short = {name: p.to(precision.param) for name, p in model.named_parameters()}
    return functional_call(model, short, (x.to(precision.param),))


@pytest.mark.parametrize("precision", CLOSE, ids=["f32", "bf16"])
@pytest.mark.parametrize("recompute", [None, "layers.*"], ids=["plain", "recompute"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore:.*matches nothing")
def test_five_steps_equal_one_device(row: str, recompute: Any, precision: Precision | None):
    plan, mesh, options = ROWS[row]
    torch.manual_seed(0)
    model, close = Model(), CLOSE[precision]
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, plan, mesh=mesh, recompute=recompute, precision=precision, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (compiled, alone)]
    for seed in range(5):
        x = torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(seed))
        losses = [out.float().square().mean() for out in (compiled(x), one_device(alone, precision, x))]
        torch.testing.assert_close(*losses, **close)
        for loss, optim in zip(losses, optimizers, strict=True):
            optim.zero_grad()
            loss.backward()
            optim.step()
    for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close, msg=lambda text, n=name: f"{n}: {text}")
    assert len(compiled.programs) == 1
