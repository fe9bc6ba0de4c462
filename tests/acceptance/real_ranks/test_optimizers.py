"""Optimizers that were made before compile, and torch's own tools on parameters, on real ranks."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.distributed.checkpoint.state_dict
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


class Normed(nn.Module):
    """Of which a plan for the products alone leaves the norm and a bias whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x)))) * self.scale


PLANS = {
    "tp": ({"up": ColwiseParallel(), "down": RowwiseParallel()}, ("tp",)),
    "fsdp of some": (Plan(dp=FullyShard("up")), ("dp",)),
    "dp": (Plan(dp=Replicated()), ("dp",)),
}


def torchs_own_tools(rank: int) -> None:
    for name, (plan, dims) in PLANS.items():
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=dims)
        alone = Normed().double()
        compiled = shardc.compile(copy.deepcopy(alone), plan, mesh=mesh)
        maker = partial(torch.optim.AdamW, lr=0.01, foreach=True)
        mine, other = maker(compiled.parameters()), maker(alone.parameters())
        for _ in range(2):
            rows = batch() if dims == ("tp",) else batch()[2 * rank : 2 * rank + 2]
            compiled(rows).square().mean().backward()
            alone(batch()).square().mean().backward()
            norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (compiled, alone)]
            torch.testing.assert_close(whole(norms[0]), norms[1], msg=name)
            for optimizer in (mine, other):
                optimizer.step()
                optimizer.zero_grad()
        for (fqn, a), b in zip(compiled.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(a), b, msg=f"{name} {fqn}")
        assert len({type(p.data) for p in compiled.parameters()}) == 1, name
        state = torch.distributed.checkpoint.state_dict.get_model_state_dict(compiled)
        assert {*state} == {*alone.state_dict()}


@on_ranks
def test_parameters_of_one_model_are_of_one_kind_and_torchs_tools_take_them():
    run_ranks(torchs_own_tools, 2)
