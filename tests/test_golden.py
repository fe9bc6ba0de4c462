"""Whole programs as text: a block of a GPT under three plans, at each stage. EXPECTTEST_ACCEPT=1 rewrites the files.

They are to be read: tests/golden/gpt_block/tp/1_sharded.txt beside 0_traced.txt shows what a plan decides.
"""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan, Program, Replicated
from shardc.compiler.pipeline.stages import Stage

FOLDER = Path(__file__).parent / "golden" / "gpt_block"
TP = {"qkv": ColwiseParallel(), "proj": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
PLANS = {
    "tp": (TP, Mesh(tp=2)),
    "dp": (Replicated(), Mesh(dp=2)),
    "fsdp_tp": (Plan(dp=FullyShard(), tp=TP), Mesh(dp=2, tp=2)),
}


class Block(nn.Module):
    """Two heads of four, hard-coded as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(self.norm2(x))))


@cache
def program(plan: str) -> Program:
    given, mesh = PLANS[plan]
    return shardc.compile(Block(), given, mesh=mesh).lower(torch.zeros(4, 6, 8))


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("plan", PLANS)
def test_a_gpt_block(plan: str, stage: Stage):
    path, found = FOLDER / plan / f"{stage.value}_{stage.name.lower()}.txt", program(plan).stage(stage.name) + "\n"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert path.read_text() == found
