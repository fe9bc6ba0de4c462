"""The integer program against trying everything: on small random graphs its answer is the cheapest there is."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardc
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.infer.choose import choose
from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.infer.objective import Objective, total
from shardc.compiler.infer.strategies import Strategies, fixed
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.spec.hardware import NEUTRAL, Hardware
from shardc.compiler.spec.mesh import Mesh
from tests.conftest import FUZZ
from tests.draw_plans import ask
from tests.draws import program

MOST, ENOUGH = 400, 200 if FUZZ else 12  # choices of a graph to try them all, and graphs
SLOW_WIRE = Hardware("slow wire", 1e12, 1e12, 1e6, latency=0.0, launch=0.0)
SLOW_DEVICE = Hardware("slow device", 1e6, 1e9, 1e12, latency=0.0, launch=0.0)


def laid_out(model: nn.Module, plan: Any, mesh: Mesh, given: Sequence[torch.Tensor], **options: Any) -> Strategies:
    """The strategies of a program as the sweep alone lays it out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        compiled = shardc.compile(model, plan, mesh=mesh, without=("choose-layouts",), **options)
        made = compiled.lower(*given)
    return Strategies(made.chosen, mesh, Decisions(), made.plan.data_axes)


def cheapest(found: Strategies, objective: Objective) -> float:
    """By trying every combination of strategies; a mark takes what comes."""
    free = [node for node, ways in found.of.items() if ways[1:] and not fixed(node)]
    held = {node: ways[0] for node, ways in found.of.items()}
    best = math.inf
    for ways in itertools.product(*(found.of[node] for node in free)):
        picked = {**held, **dict(zip(free, ways, strict=True))}
        for node in found.of:
            if fixed(node):
                (source, r) = found.value(found.operands(node)[0])
                comes = picked[source].results[r]
                picked[node] = next(way for way in found.of[node] if way.operands[0] == comes)
        best = min(best, total(found, objective, picked))
    return best


def size(found: Strategies) -> int:
    return math.prod(len(ways) for node, ways in found.of.items() if not fixed(node))


@pytest.mark.timeout(0 if FUZZ else 300)
def test_the_answer_is_the_cheapest_of_all():
    tried, better, seed = 0, 0, 0
    while tried < ENOUGH:
        seed += 1
        random = Random(seed)
        drawn = program(random)
        mesh, plan, options = ask(random, drawn).values()
        try:
            found = laid_out(drawn.model(), plan, mesh, drawn.tensors(), **(options or {}))
        except (PlanError, ShardingError):
            continue
        if not 1 < size(found) <= MOST:
            continue
        tried += 1
        for machine in (NEUTRAL, SLOW_WIRE, SLOW_DEVICE):
            objective = Objective(mesh, machine)
            best, exact = choose(found, objective), cheapest(found, objective)
            assert best.cost == pytest.approx(total(found, objective, best.picked)), drawn
            assert best.bound <= exact * (1 + 1e-6), (drawn, "the bound")
            assert best.cost <= exact * (1 + 1e-3) + 1e-12, drawn
            first = total(found, objective, {node: ways[0] for node, ways in found.of.items()})
            better += best.cost < first * (1 - 1e-6)
    assert better  # ... and the sweep alone is not always that


class Layers(nn.Module):
    """Layers whose second product needs whole columns of a first that is split by them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.cumsum(layer(x), 1)
        return x


def test_equal_layers_are_decided_once_and_alike():
    """Only the columns of the program for the first and last of them are their own."""
    columns = {}
    for depth in (4, 12):
        found = laid_out(Layers(depth), None, Mesh(cp=2), [torch.ones(2, 8, 16)], inputs=Shard(1), outputs=Shard(1))
        picked = choose(found, Objective(found.mesh, NEUTRAL)).picked
        columns[depth] = {(node.target, way) for node, way in picked.items() if node.op == "call_function"}
    assert columns[4] == columns[12]


def test_ranks_choose_alike():
    picked = []
    for _ in range(2):
        found = laid_out(Layers(3), None, Mesh(cp=2), [torch.ones(2, 8, 16)], inputs=Shard(1), outputs=Shard(1))
        picked.append([*choose(found, Objective(found.mesh, NEUTRAL)).picked.values()])
    assert picked[0] == picked[1]


class Causal(nn.Module):
    """Causal attention with a bias, which takes its sequences whole, and a product behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(2, 8, 4, 4).transpose(1, 2)
        attend, bias = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.zeros(8, 8)
        mixed, _ = attend(heads, heads, heads, 0.0, True, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).reshape(2, 8, 16))


def test_what_is_made_whole_is_split_again_where_work_is_dear():
    """The sweep leaves attention and the product behind it whole; heads are dealt to the ranks, and then rows again."""
    found = laid_out(Causal(), None, Mesh(cp=4), [torch.ones(2, 8, 16)], inputs=Shard(1), outputs=Shard(1))
    objective = Objective(found.mesh, NEUTRAL)
    product = call_nodes(found.gm, torch.ops.aten.mm.default)[0]
    best = choose(found, objective).picked
    assert objective.share(found.of[product][0].results[0]) == 1.0
    assert objective.call(product, best[product]) == objective.call(product, found.of[product][0]) / 4


def test_what_ranks_share_out_stays_shared_out():
    """However dear the wire is, they do not each do the whole batch."""
    plan = shardc.Plan(dp=shardc.Replicated())
    found = laid_out(nn.Linear(4, 4), plan, Mesh(dp=2), [torch.ones(4, 4)])
    product = call_nodes(found.gm, torch.ops.aten.mm.default)[0]
    assert all("dp" in way.results[0].axes() or way.results[0].pending for way in found.of[product])
