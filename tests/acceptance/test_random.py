"""Random operators do not depend on the layout: cases 100 and 209, and what rng="replay" draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.checkpoint import checkpoint

import shardc
from shardc import Layout, Mesh, Plan, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

# On x of (5, 7): over 4 ranks its columns are uneven and one rank has none.
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(5, 7),
    "randn": lambda x: torch.randn(5, 7, dtype=torch.cfloat),
    "randint": lambda x: torch.randint(2, 9, (5, 7)),
    "rand_like": torch.rand_like,
    "randn_like": lambda x: torch.randn_like(x.t()).t(),
    "randint_like": lambda x: torch.randint_like(x, 2**20),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda x: torch.empty_like(x).bernoulli_(x[0].sigmoid()),
    "dropout": lambda x: F.dropout(x, 0.4),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.4),
    "native_dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 2),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "normal": lambda x: torch.normal(x, 0.5) + torch.normal(0.5, x.abs()) + torch.normal(x, x.abs()),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.2),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "random_": lambda x: torch.empty_like(x).random_() + torch.empty_like(x).random_(5),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "multinomial": lambda x: torch.multinomial(x.softmax(1), 3).double(),
    "poisson": lambda x: torch.poisson(x.exp()),
    "randperm": lambda x: x[torch.randperm(5)],
}


class Drawing(nn.Module):
    """A value that is split, and random numbers of every kind made from it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 7))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x * self.weight
        return {name: draw(x) for name, draw in DRAWS.items()}


def compiled(mesh: Mesh, **options: Any) -> Any:
    plan = {"weight": Shard(0)}
    both = "dp" in mesh.names
    layout = Layout(dp=Shard(0), tp=Shard(1)) if both else Layout(tp=Shard(1))
    return shardc.compile(
        Drawing(), Plan(dp=Replicated(), tp=plan) if both else plan, mesh=mesh, inputs=layout, **options
    )


def drawn(module: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Two calls, and where the generator then stands."""
    torch.manual_seed(seed)
    calls = [module(X), module(X)]
    return {f"{name}, call {i}": x for i, call in enumerate(calls) for name, x in call.items()} | {
        "after": torch.rand(2)
    }


X = torch.linspace(-2, 2, 35).reshape(5, 7)
MESHES = [Mesh(tp=2), Mesh(tp=4), Mesh(dp=2, tp=2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return drawn(compiled(Mesh(tp=1)))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_same_numbers_on_any_mesh(mesh: Mesh, alone: dict[str, Tensor]):
    ours = compiled(mesh)
    for name, have in drawn(ours).items():
        assert torch.equal(have, alone[name]), name
    ours.programs[-1].verify(X)
    again = drawn(ours, seed=4)
    for name in DRAWS:
        first = alone[f"{name}, call 0"]
        assert not torch.equal(first, alone[f"{name}, call 1"]) and not torch.equal(first, again[f"{name}, call 0"]), (
            name
        )


@pytest.mark.parametrize("mesh", [Mesh(tp=1), *MESHES], ids=str)
def test_replayed_numbers_are_those_of_plain_torch(mesh: Mesh):
    ours = compiled(mesh, rng="replay")
    have, want = drawn(ours), drawn(Drawing())
    for name in want:
        assert torch.equal(have[name], want[name]), name
    ours.programs[-1].verify(X)


def test_replayed_draws_that_nothing_uses_still_move_the_generator():
    class Wasteful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            y = x + torch.rand_like(x)
            torch.randn(2)
            return y

    x = torch.randn(4, 6)
    ours = shardc.compile(Wasteful(), Replicated(), mesh=Mesh(dp=2), rng="replay")
    torch.manual_seed(0)
    want = [Wasteful()(x), torch.rand(2)]
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip([ours(x), torch.rand(2)], want, strict=True))


# -- training --------------------------------------------------------------------------------------


class Feed(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(6, 12), nn.Linear(12, 6), again

    def block(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(F.dropout(self.up(x).relu(), 0.3, self.training)), 0.2, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)  # pyright: ignore
        return x + torch.rand_like(x)


TP = {"up": ColwiseParallel(), "down": RowwiseParallel()}
WAYS: dict[str, tuple[Any, Mesh, dict[str, Any]]] = {
    "alone": (TP, Mesh(tp=1), {}),
    "tp": (TP, Mesh(tp=2), {}),
    "uneven tp": (TP, Mesh(tp=5), {}),
    "dp": (Replicated(), Mesh(dp=2), {}),
    "dp, recomputed": (Replicated(), Mesh(dp=2), {"recompute": ""}),
    "tp, recomputed": (TP, Mesh(tp=2), {"recompute": ["up", "down", ""]}),
    "both": (Plan(dp=Replicated(), tp=TP), Mesh(dp=2, tp=2), {}),
}


@pytest.mark.parametrize("rng", ["counter", "replay"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpoint"])
def test_dropout_trains_alike_on_every_mesh(rng: str, again: bool):
    torch.manual_seed(0)
    model, x, found = Feed(again).double(), torch.randn(4, 6, dtype=torch.float64), {}
    for name, (plan, mesh, options) in WAYS.items():
        ours = shardc.compile(copy.deepcopy(model), plan, mesh=mesh, rng=rng, **options)
        torch.manual_seed(5)
        for _ in range(2):
            ours(x).square().sum().backward()
        ours.programs[-1].verify(x)
        found[name] = {n: p.grad for n, p in ours.named_parameters()}
    if rng == "replay":
        torch.manual_seed(5)
        for _ in range(2):
            model(x).square().sum().backward()
        found["one device"] = {n: p.grad for n, p in model.named_parameters()}
    for grads in found.values():
        torch.testing.assert_close(grads, found["alone"], rtol=1e-10, atol=1e-12)


def test_only_the_seed_moves_for_dropout():
    ours = shardc.compile(Feed(), TP, mesh=Mesh(tp=2))
    program = ours.lower(torch.randn(4, 6))
    sent = [(c.kind, str(c.dtype), c.numel) for c in program.collectives()]
    assert sent == [("all_reduce", "torch.int64", 2), ("all_reduce", "torch.float32", 24)]


def test_recomputed_masks_are_not_saved():
    x = torch.randn(64, 6)
    saved = {}
    for options in ({}, {"recompute": ""}):
        program = shardc.compile(Feed(), Replicated(), mesh=Mesh(dp=2), **options).lower(x)
        nodes = {n.name: n for n in program.halves.forward.graph.nodes}
        saved[bool(options)] = [n for n in program.halves.saved if "lt" in n and n in nodes]
    assert len(saved[False]) == 2 and not saved[True]


# -- on ranks --------------------------------------------------------------------------------------


class Ones(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x * self.weight
        return F.dropout(x, 0.5), torch.rand_like(x), torch.rand(4, 6), torch.multinomial(x.detach().abs() + 1, 6)


MADE = Layout(tp=Shard(1)), Layout(tp=Shard(1)), Layout(), Layout()


def masks(rank: int) -> list[Any]:
    """Two calls and a backward; the ranks' own generators stand elsewhere."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    out = []
    for rng in ("counter", "replay"):
        torch.manual_seed(7 if rank == 0 else 100)
        ours = shardc.compile(Ones(), {"weight": Shard(0)}, mesh=mesh, rng=rng, outputs=MADE)
        results = [t for _ in range(2) for t in ours(torch.ones(4, 6))]
        (results[0].sum() + results[1].sum()).backward()
        grad = ours.get_parameter("weight").grad.full_tensor()  # pyright: ignore
        out.append(([t.detach() for t in results], grad, torch.rand(1)))
    return out


@on_ranks
def test_shards_differ_replicas_agree_and_one_device_draws_the_same():
    """Cases 100 and 209."""
    first, second = run_ranks(masks, 2)
    for i, rng in enumerate(("counter", "replay")):
        torch.manual_seed(7)
        alone = shardc.compile(Ones(), {"weight": Shard(0)}, mesh=Mesh(tp=1), rng=rng)
        want = [t for _ in range(2) for t in alone(torch.ones(4, 6))]
        (want[0].sum() + want[1].sum()).backward()
        for k, (a, b, whole) in enumerate(zip(first[i][0], second[i][0], want, strict=True)):
            split = k % 4 < 2
            assert torch.equal(torch.cat([a, b], 1) if split else a, whole), (rng, k)
            assert torch.equal(a, b) != split, (rng, k)
        assert torch.equal(first[i][1], alone.get_parameter("weight").grad)
        assert torch.equal(first[i][2], torch.rand(1))  # the first rank's generator goes on as one device's does
        assert not torch.equal(second[i][2], first[i][2])  # and the other's is its own
