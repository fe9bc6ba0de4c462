"""What simulation cannot show of tensor parallelism: local tensors, DTensor parameters, process groups, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode

import shardc
from shardc import Plan, RankMismatchError, Replicated
from tests.acceptance.models import MLP, MLP_TP, TRANSFORMER_SP, TRANSFORMER_TP, Transformer
from tests.runtime.ranks import on_ranks, run_ranks

CLOSE = {"rtol": 2e-5, "atol": 1e-5}
close = torch.testing.assert_close


class Dispatches(TorchDispatchMode):
    """Operators called on DTensors, and collectives, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.on_dtensors: list[str] = []
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            self.on_dtensors.append(str(func))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives.append(func._opname)
        return func(*args, **(kwargs or {}))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def line(n: int) -> DeviceMesh:
    return init_device_mesh("cpu", (n,), mesh_dim_names=("tp",))


def pair(make: Callable[[], nn.Module], plan: Any, mesh: DeviceMesh, **options: Any) -> tuple[Any, nn.Module]:
    """A model compiled on these ranks, and the same model alone."""
    torch.manual_seed(0)
    model = make()
    alone = copy.deepcopy(model)
    return shardc.compile(model, plan, mesh=mesh, **options), alone


def check_state(compiled: nn.Module, alone: nn.Module, grads: bool = False) -> None:
    theirs = dict(alone.named_parameters())
    assert list(dict(compiled.named_parameters())) == list(theirs)
    for name, param in compiled.named_parameters():
        have, want = (param.grad, theirs[name].grad) if grads else (param.detach(), theirs[name].detach())
        assert (have is None) == (want is None), name
        if have is not None:
            close(whole(have), want, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- two ranks


def on_two_ranks(rank: int) -> list[str]:
    mesh = line(2)
    local_shapes(rank, mesh)
    parameters_are_dtensors(mesh)
    nothing_is_dispatched_on_dtensors(mesh)
    state_goes_round(mesh)
    weights_come_from_the_source(rank, mesh)
    without_a_source_nothing_is_sent(rank, mesh)
    uneven_inputs_are_refused(rank, mesh)
    compiled, _ = pair(MLP, MLP_TP, mesh)
    with torch.no_grad():
        compiled(torch.randn(8, 16))
    assert compiled.programs[-1].halves.backward is None
    return [compiled.programs[-1].hash, compiled.lower(torch.randn(8, 16, requires_grad=True)).hash]


def local_shapes(rank: int, mesh: DeviceMesh) -> None:
    """Case 1: half of the columns out; the gradient of a whole input is whole."""
    compiled, alone = pair(lambda: nn.Linear(16, 16), ColwiseParallel(), mesh)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, want = compiled(x), alone(y)
    assert type(out) is Tensor and out.shape == (8, 8)
    close(out, want.chunk(2, -1)[rank], **CLOSE)
    out.square().sum().backward()
    want.square().sum().backward()
    close(x.grad, y.grad, **CLOSE)
    check_state(compiled, alone, grads=True)
    # Case 6: each rank feeds its own slice of the rows, and gets its own slice of the result.
    plan = {"net1": ColwiseParallel(input_layouts=Shard(0)), "net2": RowwiseParallel(output_layouts=Shard(0))}
    compiled, alone = pair(MLP, plan, mesh)
    mine, want = x.detach().chunk(2)[rank], alone(x.detach())
    out = compiled(mine)
    close(out, want.chunk(2)[rank], **CLOSE)
    out.square().sum().backward()
    want.square().sum().backward()
    check_state(compiled, alone, grads=True)


def parameters_are_dtensors(mesh: DeviceMesh) -> None:
    """Case 5, over three steps of each optimizer."""
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        compiled, alone = pair(MLP, MLP_TP, mesh)
        placements = {n: p.placements for n, p in compiled.named_parameters() if isinstance(p, DTensor)}
        split = {"net1.weight": (Shard(0),), "net1.bias": (Shard(0),), "net2.weight": (Shard(1),)}
        assert placements == {**split, "net2.bias": (Replicate(),)}
        assert compiled.net1.weight.shape == (23, 16)
        assert compiled.net1.weight.to_local().shape == (12 - mesh.get_local_rank(), 16)
        both = [optimizer(m.parameters(), lr=0.01) for m in (compiled, alone)]
        for step in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            out, want = compiled(x), alone(x)
            close(out, want, **CLOSE)
            for loss in (out.square().mean(), want.square().mean()):
                loss.backward()
            check_state(compiled, alone, grads=True)
            grad = compiled.net2.weight.grad
            assert isinstance(grad, DTensor) and grad.placements == (Shard(1),)
            for o in both:
                o.step()
                o.zero_grad()
            check_state(compiled, alone)


def nothing_is_dispatched_on_dtensors(mesh: DeviceMesh) -> None:
    compiled, _ = pair(MLP, MLP_TP, mesh)
    x = torch.randn(8, 16, requires_grad=True)
    params = list(compiled.parameters())
    compiled(x)
    with Dispatches() as seen:
        out = compiled(x)
        # Unlike backward(), which has autograd itself detach what it leaves in .grad.
        torch.autograd.grad(out.sum(), [x, *params])
    assert seen.on_dtensors == [], seen.on_dtensors
    assert len(seen.collectives) == 2, seen.collectives


def state_goes_round(mesh: DeviceMesh) -> None:
    """Case 106, in short: the same keys, live shards, and whole tensors in and out."""
    compiled, alone = pair(MLP, MLP_TP, mesh)
    state = compiled.state_dict()
    assert list(state) == list(alone.state_dict())
    weight = compiled.net1.weight
    assert state["net1.weight"].to_local().data_ptr() == weight.to_local().data_ptr()
    other = {name: value + 1 for name, value in alone.state_dict().items()}
    compiled.load_state_dict(other)
    alone.load_state_dict(other)
    assert compiled.net1.weight is weight
    check_state(compiled, alone)
    full = compiled.full_state_dict()
    assert all(torch.equal(full[name], value) for name, value in other.items())
    compiled.load_state_dict({name: value.clone() for name, value in state.items()})
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    close(compiled(x), alone(x), **CLOSE)


def weights_come_from_the_source(rank: int, mesh: DeviceMesh) -> None:
    """Case 26."""
    torch.manual_seed(rank)
    model = MLP()
    mine = {name: p.detach().clone() for name, p in model.named_parameters()}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    compiled = shardc.compile(model, MLP_TP, mesh=mesh, src_data_rank=1)
    for name, param in compiled.named_parameters():
        assert torch.equal(whole(param.detach()), everyone[1][name]), name


def without_a_source_nothing_is_sent(rank: int, mesh: DeviceMesh) -> None:
    """Case 26."""
    torch.manual_seed(rank)
    model = MLP()
    mine = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Dispatches() as seen:
        compiled = shardc.compile(model, MLP_TP, mesh=mesh, src_data_rank=None)
    assert seen.collectives == []
    assert torch.equal(compiled.net1.weight.to_local(), mine["net1.weight"].chunk(2)[rank])
    assert torch.equal(compiled.net2.weight.to_local(), mine["net2.weight"].chunk(2, 1)[rank])
    assert torch.equal(compiled.net2.bias.to_local(), mine["net2.bias"])


def uneven_inputs_are_refused(rank: int, mesh: DeviceMesh) -> None:
    """Plain tensors of different sizes: an error on every rank; as a DTensor the same rows are right."""
    plan = {"net1": ColwiseParallel(input_layouts=Shard(0)), "net2": RowwiseParallel(output_layouts=Shard(0))}
    compiled, alone = pair(MLP, plan, mesh)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    mine = x.chunk(2)[rank]
    with pytest.raises((RankMismatchError, ValueError), match="size|shape"):
        compiled(mine)
    given = DTensor.from_local(mine, mesh, (Shard(0),), run_check=False, shape=x.shape, stride=x.stride())
    close(compiled(given), alone(x).chunk(2)[rank], **CLOSE)


@on_ranks
def test_two_ranks_compute_one_model():
    """Cases 1, 5, 6, 26, 27, 106: and every rank has the same programs."""
    first, second = run_ranks(on_two_ranks, 2)
    assert first == second


# --- four ranks


def on_four_ranks(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    uneven_embedding(rank, line(4))
    return [
        train_transformer(line(4), TRANSFORMER_SP),
        train_transformer(mesh, Plan(dp=Replicated(), tp=TRANSFORMER_TP)),
    ]


def train_transformer(mesh: DeviceMesh, plan: Any) -> str:
    """Cases 20, 23 and 24 over three steps; with data parallelism each pair of ranks has its own sequences."""
    compiled, alone = pair(lambda: Transformer(vocab=13, layers=1, tied=True), plan, mesh)
    assert compiled.head.weight is compiled.tokens.weight
    both = [torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-3) for m in (compiled, alone)]
    names = mesh.mesh_dim_names or ()
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        ids, target = (torch.randint(13, (4, 6), generator=draw) for _ in range(2))
        mine, aim = ids, target
        if "dp" in names:
            mine, aim = (t.chunk(2)[mesh.get_local_rank("dp")] for t in (ids, target))
        F.cross_entropy(compiled(mine).flatten(0, 1), aim.flatten()).backward()
        F.cross_entropy(alone(ids).flatten(0, 1), target.flatten()).backward()
        check_state(compiled, alone, grads=True)
        for o in both:
            o.step()
            o.zero_grad()
        check_state(compiled, alone)
    (program,) = compiled.programs
    return program.hash


def uneven_embedding(rank: int, mesh: DeviceMesh) -> None:
    """Case 8: 9 rows on 4 ranks are 3, 3, 3 and none."""
    style = RowwiseParallel(output_layouts=Replicate())
    compiled, alone = pair(lambda: nn.Embedding(9, 4, padding_idx=2), style, mesh)
    assert compiled.weight.to_local().shape == ((3, 4) if rank < 3 else (0, 4))
    ids = torch.arange(9).reshape(3, 3)
    out, want = compiled(ids), alone(ids)
    close(out, want, **CLOSE)
    out.square().sum().backward()
    want.square().sum().backward()
    check_state(compiled, alone, grads=True)


@on_ranks
def test_four_ranks_train_a_transformer():
    """Cases 8, 20, 23, 24 on meshes of (4) and (2, 2): and every rank has the same programs."""
    first, *others = run_ranks(on_four_ranks, 4)
    assert all(hashes == first for hashes in others)
