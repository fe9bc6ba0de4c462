"""Optimizers that were made before compile, and torch's own tools on parameters, on real ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Plan, PlanError, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

MAKERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "AdamW for each": partial(torch.optim.AdamW, lr=0.01, foreach=True),
}
TP = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch() -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def made_before(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for name, maker in MAKERS.items():
        for plan in (FullyShard(), Replicated()):
            alone, held = model(), model()
            before, after = maker(held.parameters()), maker(alone.parameters())
            compiled = shardc.compile(held, Plan(dp=plan), mesh=mesh)
            schedule = torch.optim.lr_scheduler.StepLR(before, 1, 0.5)
            other = torch.optim.lr_scheduler.StepLR(after, 1, 0.5)
            for _ in range(3):
                before.zero_grad()
                after.zero_grad()
                compiled(batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
                alone(batch()).square().mean().backward()
                before.step()
                after.step()
                schedule.step()
                other.step()
            for a, b in zip(compiled.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(whole(a), b, msg=f"{name} {plan}")
            assert {id(p) for group in before.param_groups for p in group["params"]} == set(
                map(id, compiled.parameters())
            )


def stepped_before(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    held = model()
    optimizer = MAKERS["AdamW"](held.parameters())
    held(batch()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    compiled = shardc.compile(held, Plan(dp=FullyShard()), mesh=mesh)
    compiled(batch()[:2]).sum().backward()
    try:
        optimizer.step()
    except PlanError as error:
        assert "make the optimizer after compile" in error.help
    else:
        raise AssertionError("state of whole parameters went on with pieces")


def on_two_ranks(rank: int) -> None:
    made_before(rank)
    stepped_before(rank)


@on_ranks
def test_an_optimizer_made_before_compile_goes_on_with_the_shards():
    run_ranks(on_two_ranks, 2)
