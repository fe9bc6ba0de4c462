"""What ranks repeat, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import Mesh, ShardingError
from shardc.compiler.analysis.work import by_place


class Headed(nn.Module):
    """An MLP that a plan splits, and a head that it does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


TP = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def test_a_head_that_no_entry_names_is_repeated_on_every_rank():
    work = shardc.compile(Headed(), TP, mesh=Mesh(tp=4)).lower(torch.randn(6, 8)).work()
    mlp, head = 2 * 6 * 8 * 32, 2 * 6 * 8 * 4
    once = 2 * mlp + head + (4 * mlp - mlp) + 2 * head  # backward: all but the gradient of x
    assert sum(entry.flops for entry in work) == once
    assert work.repeated == pytest.approx(1 + 3 * 3 * head / once)
    assert {entry.fqn for entry in work.worst} == {"head"} and all("test_work.py" in e.where for e in work.worst)
    place, where, share = by_place(work)[0]
    assert place == "head" and "test_work.py" in where
    assert share == pytest.approx(3 * 3 * head / (once + 3 * 3 * head))


@pytest.mark.parametrize("rows", [8, 7], ids=["even", "uneven"])
@pytest.mark.parametrize("plan", [shardc.Replicated(), shardc.FullyShard()])
def test_data_parallel_ranks_repeat_nothing(plan, rows: int):
    work = shardc.compile(Headed(), plan, mesh=Mesh(dp=4)).lower(torch.randn(rows, 8)).work()
    assert work.repeated == 1.0 and not work.worst and len(work) == 8


def test_a_program_without_operations_repeats_none():
    assert shardc.compile(nn.ReLU(), shardc.Replicated(), mesh=Mesh(dp=2)).lower(torch.ones(4)).work().repeated == 1.0


def test_strict_refuses_what_repeats_more_than_a_fiftieth_with_the_line():
    with pytest.raises(ShardingError, match=r"ranks repeat \d+% of their operations, head most of them") as refused:
        shardc.compile(Headed(), TP, mesh=Mesh(tp=4), strict=True).lower(torch.randn(6, 8))
    assert "test_work.py" in refused.value.where
    allowed = {**TP, "head": ColwiseParallel(output_layouts=Replicate())}
    shardc.compile(Headed(), allowed, mesh=Mesh(tp=4), strict=True).lower(torch.randn(6, 8))


class Causal(nn.Module):
    """Causal attention with fused q, k, v, and an MLP behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(torch.relu(self.up(x)))


class Messages(nn.Module):
    """Nodes that send along edges to other nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            sent = torch.relu(layer(x.index_select(0, source)))
            x = x + torch.zeros_like(x).index_add(0, target, sent)
        return x


def test_a_causal_block_with_its_sequence_split_repeats_nothing():
    x = torch.randn(2, 64, 64, requires_grad=True)
    options = {"mesh": Mesh(cp=4), "inputs": Shard(1), "outputs": Shard(1)}
    program = shardc.compile(Causal(), shardc.Plan(cp=shardc.Replicated()), **options).lower(x)
    assert program.work().repeated == 1.0
    program.verify(x)


def test_a_graph_network_over_data_parallel_ranks_repeats_nothing():
    inputs = torch.randn(64, 32), torch.randint(64, (256,)), torch.randint(64, (256,))
    program = shardc.compile(Messages(), shardc.Replicated(), mesh=Mesh(dp=4)).lower(*inputs)
    assert program.work().repeated == 1.0
    program.verify(*inputs)
