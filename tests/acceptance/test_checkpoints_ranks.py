"""Checkpoints of real ranks: out of any layout into any other, and into a plain module on one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Plan, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

ROWS = 4


class Tied(nn.Module):
    """Sizes that two ranks do not divide, a tied weight, a buffer that changes, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 13)
        self.head.weight = self.embed.weight
        self.down.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm((x + self.down(torch.relu(self.up(x)))).mean(1)))


def last(p: Tensor) -> Shard:
    return Shard(p.dim() - 1)


TP = {"up": ColwiseParallel(), "down": RowwiseParallel()}
LAYOUTS: dict[str, Callable[[], tuple[str, object]]] = {
    "plain": lambda: ("", None),
    "replicated": lambda: ("dp", Replicated()),
    "rows": lambda: ("dp", FullyShard("up", "down")),
    "columns": lambda: ("dp", Plan(dp=FullyShard(placement=last))),
    "tensor parallel": lambda: ("tp", Plan(tp=TP)),
}

Pair = tuple[nn.Module, torch.optim.Optimizer]


def make(layout: str, seed: int) -> tuple[Pair, bool]:
    """A model under a layout with its optimizer, and whether each rank passes its own rows."""
    torch.manual_seed(seed)
    axis, plan = LAYOUTS[layout]()
    model: nn.Module = Tied()
    if axis:
        model = shardc.compile(model, plan, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=(axis,)))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return (model, adam), axis == "dp"


def step(one: Pair, split: bool, rank: int, seed: int) -> Tensor:
    model, optimizer = one
    ids = torch.randint(13, (ROWS, 3), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = model(ids.chunk(2)[rank] if split else ids).square().mean()
    loss.backward()
    optimizer.step()
    loss = loss.detach()
    if split:
        torch.distributed.all_reduce(loss)
        loss /= 2
    return loss


def all_pairs(rank: int, folder: str) -> dict[str, list[float]]:
    """Every layout out, every layout in: the next losses are equal. Returned: those losses."""
    told, others = {}, {layout: make(layout, 5) for layout in LAYOUTS}
    for source in LAYOUTS:
        one, split = make(source, 0)
        step(one, split, rank, 1)
        path = Path(folder) / source
        shardc.save_checkpoint(path, *one)
        want = [step(one, split, rank, seed) for seed in (2, 3)]
        told[source] = [x.item() for x in want]
        for target, (other, apart) in others.items():
            shardc.load_checkpoint(path, *other)
            got = [step(other, apart, rank, seed) for seed in (2, 3)]
            torch.testing.assert_close(got, want, msg=lambda t, s=source, d=target: f"{s} to {d}: {t}")
    return told


@on_ranks
def test_any_layout_into_any_other_and_into_one_process(tmp_path: Path):
    told = run_ranks(all_pairs, 2, (str(tmp_path),))[0]
    for source, losses in told.items():
        one, _ = make("plain", 5)
        shardc.load_checkpoint(tmp_path / source, *one)
        got = [step(one, False, 0, seed).item() for seed in (2, 3)]
        assert got == pytest.approx(losses, rel=1e-5), source


def die_while_saving(rank: int, folder: str, where: str) -> None:
    """Rank 1 is killed at its first call of an `os` function; rank 0 waits for it."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(1)
    model = shardc.compile(Tied(), FullyShard(), mesh=mesh)
    if rank == (where == "fsync"):  # the coordinator renames, every rank writes

        def die(*args: object, **kwargs: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, where, die)
    shardc.save_checkpoint(folder, model)


@on_ranks
@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_rank_that_is_killed_while_saving_leaves_the_last_checkpoint(where: str, tmp_path: Path):
    torch.manual_seed(0)
    kept = Tied()
    shardc.save_checkpoint(tmp_path, kept)
    with pytest.raises(shardc.RankFailure, match="SIGKILL"):
        run_ranks(die_while_saving, 2, (str(tmp_path), where))
    torch.manual_seed(2)
    shardc.load_checkpoint(tmp_path, other := Tied())
    for (name, x), y in zip(kept.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
