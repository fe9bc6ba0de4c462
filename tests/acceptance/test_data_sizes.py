"""Sizes and numbers that data decides: whole on every rank, and right, whatever the data turns out to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Layout, Mesh, PlanError, Plan, Replicated, ShardingError
from tests.agree import agrees, agrees_as_ranks

DP = Plan(dp=Replicated())


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class MaskedSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


class MaskedLoss(nn.Module):
    """Only some positions count, as in masked language models."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        counts = target != 0
        return F.cross_entropy(self.head(x)[counts], target[counts])


class Kept(nn.Module):
    """Its result has as many rows as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.lin(x[x[:, 0] > 0]).tanh()
        return kept, kept.sum() + self.lin(x).sum()


class Experts(nn.Module):
    """Each row goes to the expert that a router names, by the places that nonzero finds."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == i).squeeze(-1)
            out = out.index_add(0, rows, expert(x[rows]) * scores[rows, i].unsqueeze(-1))
        return out + x


class Answers(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        count = (x > 0).sum().item()
        largest = x.max().item()
        return torch.equal(x, y), torch.allclose(x, y), count, largest, count > 3, {"n": count + 1}, x.sum()


def test_x_of_a_mask_is_made_of_whole_operands_and_what_follows_is_whole():
    model = shardc.compile(MaskedSum(), DP, mesh=Mesh(dp=2))
    program = model.lower(torch.randn(4, 4, requires_grad=True))
    assert_expected_inline(str(program), "")
    assert_expected_inline("\n".join(program.notes()), "")


@pytest.mark.parametrize("make", [MaskedSum, Kept, Experts])
@pytest.mark.parametrize("agree", [agrees, agrees_as_ranks])
def test_values_and_gradients_are_those_of_one_device(make: Any, agree: Any):
    torch.manual_seed(0)
    agree(make().double(), [draw(7, 4)], Mesh(dp=3), DP)


def test_one_program_serves_any_data_also_where_nothing_or_a_single_row_is_left():
    model, alone = MaskedSum(), MaskedSum()
    compiled = shardc.compile(model, DP, mesh=Mesh(dp=2))
    for count in (0, 1, 2, 16):
        x = -torch.ones(16).index_fill(0, torch.arange(count), -2.0)
        xs = [x.reshape(4, 4).requires_grad_() for _ in range(2)]
        for m, x in zip((compiled, alone), xs, strict=True):
            m(x).backward()
    assert len(compiled.programs) == 1
