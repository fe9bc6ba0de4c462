"""The state of a compiled module on real ranks: what changes, is set, copied and called beside forward, as one device.

Every rank runs the cases below in one launch, and says by how much it differs from the whole batch on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardc
from shardc import FullyShard, Plan, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

PLANS = {"replicated": Replicated, "fully sharded": FullyShard}


class Model(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.seen = nn.Linear(4, 8), nn.Linear(8, 4), 1.0, None
        self.register_buffer("mean", torch.zeros(4))
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x))) * self.scale
        self.losses.append(y.square().mean())
        self.mean.data = self.mean.data * 0.5 + y.detach().mean(0)
        return y

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).square().mean()


Case = Callable[[Any, nn.Module, Tensor, Tensor, int], Any]


def difference(ours: Any, theirs: Tensor) -> float:
    ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
    return float((ours - theirs).abs().max().detach())


def outputs(ours: Any, theirs: nn.Module, mine: Tensor, whole: Tensor, rank: int) -> float:
    found = difference(ours(mine), theirs(whole).chunk(2)[rank])
    return max(found, difference(ours.mean, theirs.get_buffer("mean")))


def attributes(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    found = outputs(ours, theirs, mine, whole, rank)
    ours.scale = theirs.scale = 3.0
    for m in (ours, theirs):
        m.a.register_forward_hook(lambda module, args, out: out * 2)
    return max(found, outputs(ours, theirs, mine, whole, rank))


def methods(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    (ours.training_step(mine) + ours.losses[-1]).backward()
    (theirs.training_step(whole) + theirs.losses[-1]).backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert len(ours.losses) == 1
    return max(difference(p.grad, q.grad) for p, q in pairs)


def copies(ours: Any, theirs: nn.Module, mine: Tensor, whole: Tensor, rank: int) -> float:
    with torch.no_grad():
        found = outputs(ours, theirs, mine, whole, rank)
        ours.losses.clear()
        twin = copy.deepcopy(ours)
        for p in ours.parameters():
            p.mul_(2)
    assert type(twin).__name__ == "Model" and twin is not ours
    return max(found, outputs(twin, theirs, mine, whole, rank))


def averages(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    pairs = [(m, AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9))) for m in (ours, theirs)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m, _ in pairs]
    for _ in range(2):
        for (m, average), optimizer, x in zip(pairs, optimizers, (mine, whole), strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(m)
    return difference(pairs[0][1](mine), pairs[1][1](whole).chunk(2)[rank])


def graph_breaks(ours: Any, theirs: nn.Module, mine: Tensor, whole: Tensor, rank: int) -> float:
    torch.compile(ours, backend="eager")(mine).square().mean().backward()
    theirs(whole).square().mean().backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(difference(p.grad, q.grad) for p, q in pairs if q.grad is not None)


def another_dtype(ours: Any, theirs: nn.Module, mine: Tensor, whole: Tensor, rank: int) -> float:
    ours(mine), theirs(whole)
    return outputs(ours.to(torch.float32), theirs.to(torch.float32), mine.float(), whole.float(), rank)


def assigned(ours: Any, theirs: nn.Module, mine: Tensor, whole: Tensor, rank: int) -> float:
    ours(mine)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    return max(outputs(ours, theirs, mine, whole, rank), data_assigned(ours, theirs, mine, whole, rank))


def refused(what: str, call: Callable[[], Any]) -> float:
    try:
        call()
    except ValueError as error:
        return 0.0 if what in str(error) else 1.0
    return 1.0


def wrapped_again(ours: Any, theirs: nn.Module, mine: Tensor, whole: Tensor, rank: int) -> float:
    return refused("average its gradients once more", lambda: nn.parallel.DistributedDataParallel(ours))


class Parent(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def parent_wrapped(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    parent, alone = Parent(ours), Parent(theirs)
    alone.head.load_state_dict(parent.head.state_dict())
    found = 0.0
    if not any(isinstance(p, DTensor) for p in ours.parameters()):
        wrapped = nn.parallel.DistributedDataParallel(parent)
        found = refused("average its gradients once more", lambda: wrapped(mine))
        with torch.no_grad():
            wrapped(mine)  # where nothing is reduced
    apart = [f"inner.{name}" for name, _ in [*ours.named_parameters(), *ours.named_buffers()]]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(parent, apart)
    wrapped = nn.parallel.DistributedDataParallel(parent)
    wrapped(mine).square().mean().backward()
    alone(whole).square().mean().backward()
    pairs = zip(parent.parameters(), alone.parameters(), strict=True)
    return max(found, *(difference(p.grad, q.grad) for p, q in pairs if q.grad is not None))


def data_assigned(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    found = outputs(ours, theirs, mine, whole, rank)
    for m in (ours, theirs):
        m.a.weight.data = m.a.weight.data * 2
    if isinstance(ours.a.weight, DTensor):
        return max(found, refused("a.weight.data was assigned", lambda: ours(mine)))
    return max(found, outputs(ours, theirs, mine, whole, rank))


def frozen_scaled_and_grouped(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    for m, x in ((ours, mine), (theirs, whole)):
        weights, biases = ([p for name, p in m.named_parameters() if kind in name] for kind in ("weight", "bias"))
        optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(3):
            m.a.weight.requires_grad_(step < 1)
            optimizer.zero_grad()
            scaler.scale(m(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    return max(difference(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def one_rank_overflows(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    """All ranks skip the step, and scale less."""
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(ours(mine).square().mean() * (1.0 if rank else torch.inf)).backward()
    scaler.step(optimizer)
    scaler.update()
    same = max(difference(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    return max(same, abs(scaler.get_scale() - 32.0))


def adapters_added(ours: Any, theirs: Any, mine: Tensor, whole: Tensor, rank: int) -> float:
    found = outputs(ours, theirs, mine, whole, rank)
    ours.a = nn.Sequential(ours.a, nn.Linear(8, 8).double())
    return max(found, refused("the module changed after compile: a", lambda: ours(mine)))


CASES: list[Case] = [
    attributes, methods, copies, averages, graph_breaks, another_dtype, assigned, wrapped_again,
    parent_wrapped, data_assigned, frozen_scaled_and_grouped, one_rank_overflows, adapters_added,
]  # fmt: skip


def run_cases(rank: int) -> dict[str, float]:
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), {}
    whole = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for name, entry in PLANS.items():
        for case in CASES:
            torch.manual_seed(0)
            model = Model().double()
            alone = copy.deepcopy(model)
            compiled = shardc.compile(model, Plan(dp=entry()), mesh=mesh)
            assert compiled is model and isinstance(compiled, shardc.CompiledModule)
            found[f"{name}: {case.__name__}"] = case(compiled, alone, whole.chunk(2)[rank], whole, rank)
        with torch.device("meta"):
            model = Model().double()
        compiled = shardc.compile(model, Plan(dp=entry()), mesh=mesh, init={}).to_empty(device="cpu")
        torch.manual_seed(3)
        alone = Model().double()
        compiled.load_state_dict(alone.state_dict())
        found[f"{name}: to_empty"] = outputs(compiled, alone, whole.chunk(2)[rank], whole, rank)
    return found


@on_ranks
def test_state_is_that_of_one_device():
    for found in run_ranks(run_cases, 2):
        assert len(found) == 2 * (len(CASES) + 1)
        assert {name: d for name, d in found.items() if d > (1e-5 if "dtype" in name else 1e-12)} == {}
