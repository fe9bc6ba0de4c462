"""Data parallel on real gloo ranks: what simulation cannot show. Each rank passes its own rows.

References are computed on every rank alone, from the whole batch, with the first rank's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.checkpoint import checkpoint

import shardc
from shardc import Plan, Replicated
from tests.acceptance.models import MLP
from tests.acceptance.sizes.test_data_sizes import Answers, Experts
from tests.runtime.ranks import on_ranks, run_ranks

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def mesh_of(*ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", ranks, mesh_dim_names=("dp",))


def started(make: Callable[[], nn.Module], rank: int) -> tuple[nn.Module, nn.Module]:
    """(a model with this rank's own weights, one with the first rank's), in double precision."""
    torch.manual_seed(rank)
    mine = make().double()
    torch.manual_seed(0)
    return mine, make().double()


def rows_of(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's equal share of the rows."""
    return whole.chunk(mesh.size())[mesh.get_local_rank()]


def batches(*shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_of(out: Tensor) -> Tensor:
    return (out - 1).square().mean()


def everywhere(x: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """What each rank of the mesh has."""
    found = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(found, x.detach().contiguous(), group=mesh.get_group())
    return found


def same(ours: nn.Module, theirs: nn.Module, what: str = "data") -> None:
    """Equal parameters, or gradients, under equal names."""
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(getattr(p, what), getattr(q, what), **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def trains(rank: int, mesh: DeviceMesh, make: Callable[[], nn.Module], plan: Any, **options: Any) -> nn.Module:
    """Two steps of Adam with the rows dealt anew at each: parameters equal those of the full batch."""
    mine, alone = started(make, rank)
    compiled = shardc.compile(mine, plan(mine) if callable(plan) else plan, mesh=mesh, **options)
    same(compiled, alone)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (compiled, alone)]
    for whole in batches(2, 4 * mesh.size(), 16):
        for optim in optimizers:
            optim.zero_grad()
        loss_of(compiled(rows_of(whole, mesh))).backward()
        loss_of(alone(whole)).backward()
        same(compiled, alone, "grad")
        for optim in optimizers:
            optim.step()
        same(compiled, alone)
    return compiled


# --- 30, 31, 33, 37: they train as one device does


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))  # pyright: ignore


def children_replicated(model: nn.Module) -> None:
    for child in model.children():
        shardc.replicate(child, bucket_cap_mb=1, gradient_as_bucket_view=True)


def train_experts(rank: int, mesh: DeviceMesh) -> tuple[Any, ...]:
    """Data decides which rows an expert gets; and what forward returns as numbers."""
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(6, 4, dtype=torch.float64)
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated(), mesh=mesh)
    mine = x.chunk(2)[rank].clone().requires_grad_()
    compiled(mine).square().mean().backward()
    alone(x).square().mean().backward()
    same(compiled, alone, "grad")
    told = shardc.compile(Answers(), Replicated(), mesh=mesh)(mine.detach(), mine.detach())
    return told[:-1]


def train_plainly(rank: int) -> list[Any]:
    """Cases 30, 31, 33, 37 and 39 on one mesh, and experts."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    whole = trains(rank, mesh, MLP, Replicated())
    assert all(type(p) is nn.Parameter for p in whole.parameters())
    small = trains(rank, mesh, MLP, Plan(dp=Replicated(bucket_mb=1e-4)))
    children = trains(rank, mesh, MLP, children_replicated)
    assert len(list(children.parameters())) == 4
    again = [
        trains(rank, mesh, Checkpointed, Replicated()),
        trains(rank, mesh, Checkpointed, Replicated(), recompute="second"),
    ]
    recomputed = [
        {n.meta["path"].split(".")[0] for n in m.programs[-1].halves.backward.graph.nodes if n.meta.get("region")}
        for m in again
    ]
    moved = [[(c.kind, c.phase) for c in m.programs[-1].collectives()] for m in (whole, small, children)]
    return [train_experts(rank, mesh), *moved, *recomputed]


@on_ranks
def test_replicas_train_as_one_device_on_the_full_batch():
    once = [("all_reduce", "backward")]
    first, second = run_ranks(train_plainly, 2)
    assert first[0] == second[0]  # the numbers that data decides
    for _, whole, small, children, checkpointed, named in (first, second):
        assert whole == once and small == 4 * once and children == once
        assert checkpointed == {"first"} and named == {"first", "second"}


# --- 32, 39: state, precision


def keep_state(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mine, alone = started(lambda: nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)), rank)
    keys, kinds = list(mine.state_dict()), [v.dtype for v in mine.state_dict().values()]
    compiled = shardc.compile(mine, Replicated(), mesh=mesh)
    state = compiled.state_dict()
    assert list(state) == keys and [v.dtype for v in state.values()] == kinds
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, **CLOSE)
    other = {k: torch.full_like(v, 7) for k, v in alone.state_dict().items()}
    compiled.load_state_dict(other)
    assert all((v == 7).all() for v in compiled.state_dict().values())
    alone.load_state_dict(compiled.full_state_dict())
    assert list(compiled.full_state_dict(rank0_only=True)) == (keys if rank == 0 else [])


def reduce_in_bf16(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    alone = MLP()
    compiled = shardc.compile(copy.deepcopy(alone), Replicated(reduce_dtype=torch.bfloat16), mesh=mesh)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (compiled, alone)]
    whole = batches(3, 8, 16).float()
    for rows in whole:
        losses = [loss_of(compiled(rows_of(rows, mesh))), loss_of(alone(rows))]
        for loss, optim in zip(losses, optimizers, strict=True):
            optim.zero_grad()
            loss.backward()
            optim.step()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in compiled.parameters())  # pyright: ignore
    with torch.no_grad():
        final = [loss_of(m(whole[0])).item() for m in (lambda x: compiled(x), alone)]
    assert abs(final[0] - final[1]) < 1e-2
    return [(c.kind, str(c.dtype)) for c in compiled.programs[0].collectives()]


def state_and_precision(rank: int) -> list[Any]:
    keep_state(rank)
    return reduce_in_bf16(rank)


@on_ranks
def test_state_is_the_models_own_and_gradients_may_travel_in_bf16():
    """Cases 32 and 39."""
    assert run_ranks(state_and_precision, 2) == 2 * [[("all_reduce", "torch.bfloat16")]]


# --- 34: what is ignored stays local


def ignore_a_child(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mine, alone = started(MLP, rank)
    compiled = shardc.compile(mine, Replicated(ignored_modules="net1"), mesh=mesh)
    whole = batches(8, 16)
    loss_of(compiled(rows_of(whole, mesh))).backward()
    for name, p in compiled.named_parameters():
        first, second = everywhere(p.grad, mesh)  # pyright: ignore
        assert torch.equal(first, second) == (not name.startswith("net1")), name
    loss_of(alone(rows_of(whole, mesh))).backward()  # its own rows alone
    for name in ("net1.weight", "net1.bias"):
        torch.testing.assert_close(compiled.get_parameter(name).grad, alone.get_parameter(name).grad, **CLOSE)
    alone.zero_grad()
    loss_of(alone(whole)).backward()
    for name in ("net2.weight", "net2.bias"):
        torch.testing.assert_close(compiled.get_parameter(name).grad, alone.get_parameter(name).grad, **CLOSE)
    (program,) = compiled.programs
    assert sum(c.numel for c in program.collectives()) == sum(p.numel() for p in alone.net2.parameters())


@on_ranks
def test_gradients_of_an_ignored_child_stay_with_their_rank():
    """Case 34."""
    run_ranks(ignore_a_child, 2)


# --- 36: accumulation


def accumulate(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mine, alone = started(MLP, rank)
    compiled = shardc.compile(mine, Replicated(), mesh=mesh)
    whole = batches(6, 8, 16)

    def step(i: int) -> None:
        loss_of(compiled(rows_of(whole[i], mesh))).backward()

    with compiled.no_sync():  # compiled here, where ranks compare their programs
        compiled(rows_of(whole[0], mesh))
    assert compiled.programs[-1].collectives() == []
    for unsynchronised in (1, 2):
        alone.zero_grad()
        compiled.zero_grad()
        for i in range(unsynchronised):
            for _ in alone_in_turn(mesh):
                with compiled.no_sync():
                    step(i)
        step(unsynchronised)
        for i in range(unsynchronised + 1):
            loss_of(alone(whole[i])).backward()
        same(compiled, alone, "grad")
        kinds = [(c.kind, c.phase) for c in compiled.programs[-1].collectives()]
        assert kinds == [("all_reduce", "backward")]
    step(3)  # nothing is left over from before
    loss_of(alone(whole[3])).backward()
    same(compiled, alone, "grad")


def alone_in_turn(mesh: DeviceMesh) -> Iterator[int]:
    """One turn for each rank; the others wait meanwhile, so that a collective in it would never end."""
    for turn in range(mesh.size()):
        dist.barrier(mesh.get_group())
        if turn == mesh.get_local_rank():
            yield turn
    dist.barrier(mesh.get_group())


class SplitsItself(MLP):
    """Of its first weight each rank has the gradient of other columns, of all rows: there is no sum to keep back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(shardc.constrain(x, Shard(1)))


def two_forwards(rank: int, make: Callable[[], nn.Module] = MLP, without: str | tuple[str, ...] = ()) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mine, alone = started(make, rank)
    compiled = shardc.compile(mine, Replicated(), mesh=mesh, without=without)
    first, second, third = batches(3, 8, 16)
    (loss_of(compiled(rows_of(first, mesh))) + loss_of(compiled(rows_of(second, mesh)))).backward()
    (loss_of(alone(first)) + loss_of(alone(second))).backward()
    same(compiled, alone, "grad")
    with compiled.no_sync():  # its backward comes only after the next forward
        early = loss_of(compiled(rows_of(first, mesh)))
    late = loss_of(compiled(rows_of(third, mesh)))
    early.backward()
    late.backward()
    (loss_of(alone(first)) + loss_of(alone(third))).backward()
    same(compiled, alone, "grad")


def accumulate_in_every_order(rank: int) -> None:
    accumulate(rank)
    two_forwards(rank)
    two_forwards(rank, without="average-gradients")
    two_forwards(rank, SplitsItself)


@on_ranks
def test_unsynchronised_steps_exchange_nothing_and_are_made_up():
    """Case 36."""
    run_ranks(accumulate_in_every_order, 2)


# --- 41: batch norm


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stem(x))))


def normalise(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mine, alone = started(Normed, rank)
    with torch.no_grad():
        mine.norm.running_mean.fill_(rank)  # the first rank's counts, for buffers too
    compiled = shardc.compile(mine, Replicated(), mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, alone)]
    for whole in batches(3, 8, 16):
        for module, rows, optim in zip((compiled, alone), (rows_of(whole, mesh), whole), optimizers, strict=True):
            optim.zero_grad()
            loss_of(module(rows)).backward()
            optim.step()
    for name, buffer in compiled.named_buffers():
        torch.testing.assert_close(buffer, alone.get_buffer(name), **CLOSE)
        first, second = everywhere(buffer, mesh)
        assert torch.equal(first, second), name
    assert compiled.norm.num_batches_tracked == 3
    same(compiled, alone)


@on_ranks
def test_running_statistics_are_the_same_on_every_rank():
    """Case 41: those of the global batch."""
    run_ranks(normalise, 2)


# --- sizes that differ between ranks


def pass_uneven_rows(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    compiled = shardc.compile(MLP(), Replicated(), mesh=mesh)
    try:
        compiled(torch.randn(4 + rank, 16))
    except shardc.RankMismatchError as error:
        return str(error)
    return "no error"


@on_ranks
def test_plain_tensors_of_different_sizes_are_an_error_on_every_rank():
    for text in run_ranks(pass_uneven_rows, 2):
        assert "the compiled program" in text and "8" in text and "10" in text, text


def pass_uneven_rows_later(rank: int, rows: list[tuple[int, int]]) -> list[str]:
    """Steps with so many rows on each of two ranks; what comes of each."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    compiled = shardc.compile(MLP(), Replicated(), mesh=mesh)
    found = []
    torch.no_grad()(compiled)(torch.randn(4, 16))
    for step in rows:
        if rank == 0:  # alone: where nothing moves, nobody is asked
            torch.no_grad()(compiled)(torch.randn(4, 16))
        try:
            compiled(torch.randn(step[rank], 16)).square().mean().backward()
            found.append("right")
        except shardc.RankMismatchError as error:
            return [*found, str(error)]
    return found


@on_ranks
@pytest.mark.parametrize("known", [True, False])
def test_sizes_that_differ_at_a_later_step_are_an_error_on_every_rank(known: bool):
    """Also where every rank has a program for its size already, and gradients would have added up."""
    before = [(8, 8), (6, 6), (8, 8), (6, 6), (8, 8)] if known else [(8, 8), (8, 8)]
    found = run_ranks(pass_uneven_rows_later, 2, (before + [(8, 6), (8, 8)],))
    for told in found:
        assert told[:-1] == ["right"] * len(before)
        assert "inputs differ between ranks: rank 0 runs" in told[-1] and "rank 1 was called" in told[-1], told


def pass_distributed_rows(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    mine, alone = started(MLP, rank)
    compiled = shardc.compile(mine, Replicated(), mesh=mesh)
    whole = batches(7, 16)
    x = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    assert x.to_local().shape[0] == 4 - rank
    out = compiled(x)
    mine_out = alone(whole).chunk(2)[rank]
    torch.testing.assert_close(out.to_local() if isinstance(out, DTensor) else out, mine_out, **CLOSE)


def pass_other_layouts(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    compiled = shardc.compile(MLP(), Replicated(), mesh=mesh)
    try:
        compiled(distribute_tensor(torch.randn(8, 16), mesh, [Replicate()]))
    except shardc.PlanError as error:
        return str(error)
    return "no error"


@on_ranks
def test_distributed_tensors_may_be_uneven_and_say_how_they_lie():
    run_ranks(pass_distributed_rows, 2)
    for text in run_ranks(pass_other_layouts, 2):
        assert "x is a DTensor" in text, text


# --- 42: some of the world's ranks


def train_on_some_ranks(rank: int) -> str:
    mesh = mesh_of(1, 3)
    if rank in (1, 3):
        # The source is the mesh's first rank, number 1 of the world.
        mine, _ = started(MLP, rank)
        torch.manual_seed(1)
        alone = MLP().double()
        compiled = shardc.compile(mine, Replicated(), mesh=mesh)
        same(compiled, alone)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, alone)]
        for whole in batches(2, 8, 16):
            for module, rows, optim in zip((compiled, alone), (rows_of(whole, mesh), whole), optimizers, strict=True):
                optim.zero_grad()
                loss_of(module(rows)).backward()
                optim.step()
        same(compiled, alone)
        return "trained"
    return "waited"  # for nothing: whatever needed this rank would fail


@on_ranks
def test_a_mesh_of_some_ranks_asks_nothing_of_the_others():
    """Case 42."""
    assert run_ranks(train_on_some_ranks, 4) == ["waited", "trained", "waited", "trained"]


# --- what a module may hold


class Holds(nn.Module):
    """Tensors of many sorts, none of which is lost or changed on its way to the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.randn(()))
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.nothing = nn.Parameter(torch.randn(0, 4))
        sorts = (torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.complex64)
        for dtype in sorts:
            self.register_buffer(f"a_{str(dtype).split('.')[1]}", (torch.randn(5, 3).abs() * 2).to(dtype))
        self.register_buffer("every_other", torch.randn(8)[::2], persistent=False)
        self.register_buffer("one", torch.randn(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x) * self.scale + self.every_other + self.one
        h = self.conv(h.view(-1, 4, 1, 1)).flatten(1)
        return (h @ self.turned.t()) * self.a_bool[0] + self.a_complex64.abs()[0] + self.nothing.sum()


def hold_many_sorts(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(rank)
    mine = Holds()
    torch.manual_seed(0)
    alone = Holds()
    compiled = shardc.compile(mine, Replicated(), mesh=mesh)
    for (name, value), want in zip(compiled.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(value, want), name
        assert value.dtype == want.dtype, name
    for (name, value), want in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(value, want) and value.stride() == want.stride(), name
    whole = batches(8, 16).float()
    loss_of(compiled(rows_of(whole, mesh))).backward()
    loss_of(alone(whole)).backward()
    for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, n=name: f"{n}: {text}")


def split_a_buffer(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    alone = Tabled().double()
    compiled = shardc.compile(copy.deepcopy(alone), {"table": Shard(0), "lin": ColwiseParallel()}, mesh=mesh)
    x = batches(4, 6)
    torch.testing.assert_close(compiled(x), alone(x), **CLOSE)
    assert list(compiled.state_dict()) == list(alone.state_dict())
    torch.testing.assert_close(compiled.full_state_dict()["table"], alone.table, **CLOSE)


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 5)
        self.register_buffer("table", torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) @ self.table


def mistakes_of_one_rank(rank: int) -> list[str]:
    """Nobody answers this rank while it makes them: whatever it asked for would never come."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    calls = {
        "dpp": lambda: shardc.compile(MLP(), Plan(dpp=Replicated()), mesh=mesh),
        "bucket_mb": lambda: shardc.compile(MLP(), Replicated(bucket_mb=-1), mesh=mesh),
        "src_data_rank": lambda: shardc.compile(MLP(), Replicated(), mesh=mesh, src_data_rank=2),
        "recompute": lambda: shardc.compile(MLP(), Replicated(), mesh=mesh, recompute=1),  # pyright: ignore
        "net3": lambda: shardc.compile(MLP(), {"net3": Shard(0)}, mesh=mesh, strict=True),
        "class": lambda: shardc.compile(MLP, Replicated(), mesh=mesh),  # pyright: ignore
        "meta": lambda: shardc.compile(Tabled().to("meta"), Replicated(), mesh=mesh),
    }
    found = []
    for name, call in calls.items() if rank == 0 else ():
        try:
            call()
        except shardc.PlanError as error:
            assert name in str(error), error
            found.append(name)
    dist.barrier()
    return found


def hold_and_mistake(rank: int) -> int:
    hold_many_sorts(rank)
    split_a_buffer(rank)
    return len(mistakes_of_one_rank(rank))


@on_ranks
def test_tensors_of_all_sorts_reach_the_ranks_and_mistakes_ask_nothing_of_them():
    """Case 35, for the second half."""
    assert run_ranks(hold_and_mistake, 2) == [7, 0]
