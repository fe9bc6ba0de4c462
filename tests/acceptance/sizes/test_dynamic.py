"""`dynamic=True`: one program for batches and sequences of any size, right at each of them."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import Layout, Mesh, Plan
from tests.agree import lowering_of
from tests.runtime.ranks import on_ranks, run_ranks

CONTEXT = 24


class Attention(nn.Module):
    """One block of a language model, its loss, and a context that forward looks at."""

    def __init__(self, dim: int = 8, heads: int = 2, vocab: int = 13) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(CONTEXT, dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        rows, length = ids.shape
        if length > CONTEXT // 2:  # the later places are for long texts only
            x = self.tokens(ids) + self.places(torch.arange(length))
        else:
            x = self.tokens(ids) + self.places(torch.arange(length)) / 2
        q, k, v = (
            f(x).view(rows, length, -1, x.shape[-1] // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, -1)
        x = self.head(self.norm(x + self.out(y)))
        return F.cross_entropy(x.view(-1, x.size(-1)), targets.view(-1))


TP: dict[str, Any] = {**dict.fromkeys(("q", "k", "v"), ColwiseParallel()), "out": RowwiseParallel()}
PLANS: dict[str, tuple[Any, Mesh]] = {
    "tensor parallel": (Plan(tp=TP), Mesh(tp=2)),
    "data and tensor parallel": (Plan(dp="replicate", tp=TP), Mesh(dp=2, tp=2)),
    "fully sharded": (Plan(dp=shardc.FullyShard()), Mesh(dp=2)),
}


def text(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(13, (rows, length)), torch.randint(13, (rows, length))


def agrees(compiled: nn.Module, alone: nn.Module, call: Sequence[Tensor]) -> None:
    """Value and every gradient are those of one device."""
    compiled.zero_grad()
    alone.zero_grad()
    ours, theirs = compiled(*call), alone(*call)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def pair(model: nn.Module, plan: Any, mesh: Mesh, **options: Any) -> tuple[Any, nn.Module]:
    model = model.double()
    alone = copy.deepcopy(model)
    return shardc.compile(model, plan, mesh=mesh, dynamic=True, **options), alone


@pytest.mark.parametrize("name", ["data and tensor parallel", "fully sharded"])
def test_one_program_serves_all_batches_and_lengths(name: str):
    plan, mesh = PLANS[name]
    compiled, alone = pair(Attention(), plan, mesh)
    for size in ((6, 9), (4, 7), (2, 2), (16, 12), (12, 5), (8, 8)):
        agrees(compiled, alone, text(*size))
    assert len(compiled.programs) == 1
    agrees(compiled, alone, text(6, 20))  # the other branch
    agrees(compiled, alone, text(4, 13))
    assert len(compiled.programs) == 2
    agrees(compiled, alone, text(1, 6))  # one row means something else to broadcasting
    agrees(compiled, alone, text(1, 9))
    assert len(compiled.programs) == 3


@pytest.mark.parametrize("name, programs", [("tensor parallel", 1), ("fully sharded", 2)])
def test_rows_that_ranks_do_not_divide_take_at_most_one_program_more(name: str, programs: int):
    plan, mesh = PLANS[name]
    compiled, alone = pair(Attention(), plan, mesh)
    for size in ((3, 9), (6, 4), (5, 7), (8, 10), (2, 3), (7, 12)):
        agrees(compiled, alone, text(*size))
    assert len(compiled.programs) == programs


def test_a_size_that_is_refused_is_refused_at_every_call():
    compiled, alone = pair(Attention(), *PLANS["tensor parallel"])
    agrees(compiled, alone, text(2, 20))
    for _ in range(2):
        with pytest.raises(IndexError):
            alone(*text(2, CONTEXT + 1))
        with pytest.raises(Exception, match="out of range"):
            compiled(*text(2, CONTEXT + 1))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Dropped(nn.Module):
    """Random numbers are counted by their place in the global tensor, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(x)), 0.5)) * x.shape[0] ** -0.5


def images(rows: int, height: int, width: int) -> tuple[Tensor]:
    return (torch.randn(rows, 3, height, width, dtype=torch.float64),)


def test_images_of_any_size():
    compiled, alone = pair(Convolutions(), Plan(dp="replicate"), Mesh(dp=2))
    for size in ((4, 12, 16), (6, 9, 10), (3, 20, 8)):
        agrees(compiled, alone, images(*size))
    assert len(compiled.programs) <= 2
    for ours, theirs in zip(compiled.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_random_numbers_are_those_of_a_program_for_the_size():
    model = Dropped().double()
    plan, mesh = {"up": ColwiseParallel(), "down": RowwiseParallel()}, Mesh(tp=2)
    fixed = shardc.compile(copy.deepcopy(model), plan, mesh=mesh)
    loose = shardc.compile(model, plan, mesh=mesh, dynamic=True)
    for rows in (6, 5, 9):
        x = torch.randn(rows, 6, dtype=torch.float64)
        torch.manual_seed(rows)
        wanted = fixed(x)
        torch.manual_seed(rows)
        torch.testing.assert_close(loose(x), wanted, rtol=0, atol=0)
    assert len(loose.programs) == 1 and len(fixed.programs) == 3


class Windowed(nn.Module):
    """What it makes of a size is in no expression of the trace: the pieces that ranks exchange."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 0) * 2


def test_what_cannot_be_one_program_gets_one_for_each_size(caplog: pytest.LogCaptureFixture):
    compiled, alone = pair(Windowed(), Plan(dp="replicate"), Mesh(dp=3), inputs={"x": Layout(dp=Shard(0))})
    with caplog.at_level(logging.WARNING, logger="shardc"):
        for rows in (6, 7, 12):
            x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(compiled(x), alone(x))
    assert len(compiled.programs) == 3
    assert "this program is for its own sizes only" in caplog.text


def test_sizes_beyond_what_stays_bound_are_bound_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shardc.compiler.driver.calls.program_cache.PROGRAMS", 2)
    compiled, alone = pair(nn.Linear(4, 6), {"": ColwiseParallel()}, Mesh(tp=2))
    for rows in (8, 5, 6, 7, 5, 9, 8):
        agrees(compiled, alone, (torch.randn(rows, 4, dtype=torch.float64),))
    assert len(compiled.programs) == 1
    assert len(lowering_of(compiled)._entries) == 2


def test_programs_for_many_sizes_are_not_saved(tmp_path: Any):
    compiled, _ = pair(nn.Linear(4, 6), {"": ColwiseParallel()}, Mesh(tp=2))
    with pytest.raises(shardc.PlanError, match="dynamic=True cannot be saved"):
        compiled.save_programs(tmp_path / "programs.json")


def train(rank: int) -> tuple[int, list[str]]:
    """Three sizes equal one device; then rank 1 has a row more than rank 0."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    model = Attention().double()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Plan(dp=shardc.FullyShard("q")), mesh=mesh, dynamic=True)
    for rows, length in ((4, 7), (6, 11), (2, 5)):
        whole = text(rows, length)
        mine = [x.chunk(2)[rank] for x in whole]
        compiled.zero_grad()
        alone.zero_grad()
        compiled(*mine).backward()
        alone(*whole).backward()
        for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
            have: Callable[[], Tensor] | None = getattr(p.grad, "full_tensor", None)
            torch.testing.assert_close(have() if have else p.grad, q.grad)
    try:
        compiled(*text(2 + rank, 5))
        told = []
    except Exception as error:
        told = [f"{type(error).__name__}: {error}"]
    return len(compiled.programs), told


@on_ranks
def test_real_ranks_share_the_program_and_must_agree_on_the_size():
    for programs, told in run_ranks(train, 2):
        assert programs == 1
        assert len(told) == 1 and told[0].startswith("RankMismatchError")


class Cache(nn.Module):
    """Keys and values that are passed in: two arguments whose rows are as many, which only attention needs."""

    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.q, self.grows = nn.Linear(8, 8), grows

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.q(x)[:, None]
        if self.grows:
            keys, values = torch.cat([keys, q], 2), torch.cat([values, q], 2)
        return F.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize("grows", [False, True])
def test_sizes_that_only_an_operator_needs_equal_change_together(grows: bool):
    model = Cache(grows).double()
    alone, compiled = copy.deepcopy(model), shardc.compile(model, shardc.Replicated(), mesh=Mesh(dp=2), dynamic=True)
    for n in (8, 9, 11):
        call = [torch.randn(4, *shape, 8, dtype=torch.float64) for shape in ((1,), (1, n), (1, n))]
        agrees(compiled, alone, call)
    assert len(compiled.programs) == 1


@pytest.mark.parametrize("plan", [shardc.Replicated(), shardc.FullyShard("1")])
def test_what_is_less_work_at_some_sizes_is_no_reason_for_another_program(plan: Any):
    """Tangents are smaller than gradients for short texts, and larger for long ones; gathers likewise."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)).double()
    alone, compiled = copy.deepcopy(model), shardc.compile(model, plan, mesh=Mesh(dp=2), dynamic=True)
    for length in (5, 6, 7, 40, 9):
        agrees(compiled, alone, (torch.randint(10, (4, length)),))
    assert len(compiled.programs) == 1
