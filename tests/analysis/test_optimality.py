"""The cost of a program, the bound, and what the next best choice would cost."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan, Replicated
from shardc.compiler.ir.graph import call_nodes
from tests.analysis.test_work import TP, Headed
from tests.infer.test_choose import Causal

PLANS = {
    "dp": (Replicated(), Mesh(dp=4)),
    "fsdp": (FullyShard(), Mesh(dp=4)),
    "tp": (TP, Mesh(tp=4)),
    "dp and tp": (Plan(dp=Replicated(), tp=TP), Mesh(dp=2, tp=2)),
    "fsdp and tp": (Plan(dp=FullyShard(), tp=TP), Mesh(dp=2, tp=2)),
    "three": (Plan(outer=Replicated(), dp=FullyShard(), tp=TP), Mesh(outer=2, dp=2, tp=2)),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_in_use_are_near_the_bound(name: str):
    plan, mesh = PLANS[name]
    program = shardc.compile(Headed(), plan, mesh=mesh).lower(torch.randn(64, 8))
    cost, bound, gap = program.optimality()
    assert 0 < bound <= cost and gap == pytest.approx((cost - bound) / cost)
    assert gap <= 0.005


def test_what_moves_more_than_it_must_is_above_the_bound():
    """A sum that is needed whole at once, though a layer behind it takes rows."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": ColwiseParallel()}
    machine = shardc.Hardware("slow wire", 1e15, 1e13, 1e3, latency=0.0, launch=0.0)
    options = {"mesh": Mesh(tp=4), "hardware": machine}
    fast = shardc.compile(Headed(), plan, **options).lower(torch.randn(64, 8)).optimality()
    slow = shardc.compile(Headed(), TP, mesh=Mesh(tp=4), hardware="h100").lower(torch.randn(64, 8)).optimality()
    assert fast.cost > slow.cost


@pytest.mark.filterwarnings("ignore:the plan is empty")
def test_an_explanation_says_what_the_choice_costs_and_the_next_best():
    """A causal product behind attention is each rank's own rows; taking all of them would cost more."""
    sides = {"inputs": Shard(1), "outputs": Shard(1)}
    program = shardc.compile(Causal(), None, mesh=Mesh(cp=4), **sides).lower(torch.randn(2, 8, 16))
    product = call_nodes(program.chosen, torch.ops.aten.mm.default)[0].name
    text = program.explain(product)
    assert "chosen to cost" in text and "next best" in text, text
