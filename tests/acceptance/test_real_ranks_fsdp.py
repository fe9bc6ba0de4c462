"""FullyShard on real gloo ranks, beside torch's own fully_shard: what simulation cannot show.

Each rank passes its own rows; references are computed on every rank alone, from the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardc
from shardc import FullyShard, Plan
from tests.acceptance.models import Transformer
from tests.runtime.ranks import on_ranks, run_ranks

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def model() -> nn.Module:
    """A vocabulary and a width that 2 ranks do not divide."""
    torch.manual_seed(0)
    return Transformer(vocab=13, dim=12, heads=3, layers=2, tied=True).double()


def tokens(step: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(13, (rows, 7), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(run: nn.Module, rank: int, ranks: int, steps: int = 4) -> list[float]:
    """The mean loss over all ranks at each step of Adam."""
    optim = torch.optim.Adam(run.parameters(), lr=0.01)
    out = []
    for step in range(steps):
        ids, targets = (t.chunk(ranks)[rank] for t in tokens(step))
        optim.zero_grad()
        loss = loss_of(run(ids), targets)
        loss.backward()
        optim.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        out.append(total.item() / ranks)
    return out


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal whole parameters under equal names."""
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        p, q = (t.full_tensor() if isinstance(t, DTensor) else t for t in (p, q))
        torch.testing.assert_close(p, q, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


def beside_torch(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    theirs = model()
    for layer in theirs.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh)
    fully_shard(theirs, mesh=mesh)
    ours = shardc.compile(model(), Plan(dp=FullyShard("layers.*")), mesh=mesh)
    sizes = [p.to_local().numel() for p in ours.parameters() if isinstance(p, DTensor)]
    assert sizes == [p.to_local().numel() for p in theirs.parameters() if isinstance(p, DTensor)]
    found = [losses(m, rank, 2) for m in (ours, theirs)]
    torch.testing.assert_close(*map(torch.tensor, found), **EXACT)
    same(ours, theirs)
    kept = shardc.compile(model(), Plan(dp=FullyShard("layers.*", reshard_after_forward=False)), mesh=mesh)
    torch.testing.assert_close(torch.tensor(losses(kept, rank, 2)), torch.tensor(found[0]), **EXACT)
    return [(c.kind, c.phase) for c in ours.programs[-1].collectives()]


@on_ranks
def test_losses_and_parameters_are_those_of_fully_shard_step_for_step():
    first, second = run_ranks(beside_torch, 2)
    assert first == second
    forward, backward = ("all_gather", "forward"), ("all_gather", "backward")
    assert [first.count(what) for what in (forward, backward, ("reduce_scatter", "backward"))] == [3, 3, 3]
    assert len(first) == 9
