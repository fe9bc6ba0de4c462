"""Layouts chosen together, in programs as users write them: what ranks repeat and move, and what is left alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import Mesh, Program
from shardc.passes.layouts import choose_layouts

NAME = "choose-layouts"
ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Block(nn.Module):
    """One causal block of a transformer with a bias beside the causal mask, which takes its sequences whole."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mixed, _ = ATTEND(q, k, v, 0.0, True, attn_mask=torch.zeros(t, t))
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(torch.relu(self.up(x)))


class Graph(nn.Module):
    """Messages along edges, added up where they end."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(x).index_add(0, end, torch.relu(self.message(x))[begin])
        return self.update(torch.cat([x, found], -1))


def made(model: nn.Module, plan: Any, mesh: Mesh, *inputs: torch.Tensor, **options: Any) -> Program:
    return shardc.compile(model, plan, mesh=mesh, **options).lower(*inputs)


def changed(program: Program) -> int:
    return next(record for record in program.records if record.name == NAME).changes.get("calls", 0)


TP = {"qkv": ColwiseParallel(), "proj": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
SPLIT = {"inputs": Shard(1), "outputs": Shard(1)}


@pytest.mark.filterwarnings("ignore:the plan is empty")
def test_a_split_sequence_is_no_work_done_twice():
    x = torch.randn(2, 8, 32)
    swept = made(Block(), None, Mesh(cp=4), x, **SPLIT, without=NAME)
    chosen = made(Block(), None, Mesh(cp=4), x, **SPLIT)
    assert swept.work().repeated > 1.2 and chosen.work().repeated == 1.0
    assert changed(chosen) and not chosen.work().worst
    chosen.verify(x)


def test_a_graph_network_moves_less():
    inputs = torch.randn(16, 16), torch.randint(16, (24,)), torch.randint(16, (24,))
    swept = made(Graph(), shardc.Replicated(), Mesh(dp=4), *inputs, without=NAME)
    chosen = made(Graph(), shardc.Replicated(), Mesh(dp=4), *inputs)
    moved = [sum(c.bytes_on_wire for c in program.collectives()) for program in (swept, chosen)]
    assert moved[1] < moved[0] and chosen.work().repeated == 1.0
    chosen.verify(*inputs)


@pytest.mark.parametrize("plan", [shardc.Replicated(), shardc.FullyShard(), ColwiseParallel()])
def test_where_no_call_needs_another_layout_nothing_is_solved(plan: Any):
    with mock.patch.object(choose_layouts, "choose", side_effect=AssertionError):
        made(nn.Linear(32, 32), plan, Mesh(dp=2), torch.randn(4, 6, 32))


def test_plans_that_are_cheapest_as_they_are_stay():
    assert not changed(made(Block(), TP, Mesh(tp=2), torch.randn(4, 6, 32, requires_grad=True)))


@pytest.mark.filterwarnings("ignore:the plan is empty")
def test_what_saves_too_little_is_left_alone():
    x = torch.randn(2, 8, 32)
    with mock.patch.object(choose_layouts, "WORTH", 1.0):
        assert not changed(made(Block(), None, Mesh(cp=4), x, **SPLIT))


@pytest.mark.filterwarnings("ignore:the plan is empty")
def test_one_program_still_serves_many_sizes():
    model = shardc.compile(Block(), None, mesh=Mesh(cp=2), dynamic=True, **SPLIT)
    alone = model.state_dict()
    for length in (8, 16, 24):
        x = torch.randn(2, length, 32)
        block = Block()
        block.load_state_dict({name: value.clone() for name, value in alone.items()})
        torch.testing.assert_close(model(x), block(x), rtol=1e-4, atol=1e-5)
    programs = {id(model.lower(torch.randn(2, length, 32)).records) for length in (8, 16, 24)}
    assert len(programs) == 1


@pytest.mark.filterwarnings("ignore:the plan is empty")
def test_another_machine_may_make_another_program():
    """Where every step of a message takes a second, there are fewer of them."""
    far = shardc.Hardware("far apart", 1e15, 1e13, 1e12, latency=1.0, launch=0.0)
    x = torch.randn(2, 8, 32)
    here, there = (made(Block(), None, Mesh(cp=4), x, **SPLIT, hardware=machine) for machine in (None, far))
    assert len(there.collectives()) < len(here.collectives())
    assert made(Block(), None, Mesh(cp=4), x, **SPLIT, hardware="h100").hardware.name == "h100"
