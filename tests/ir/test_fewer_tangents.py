"""Backward halves without some of what they start from."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Interpreter

import shardc
from shardc import FullyShard, Mesh, Plan, Replicated
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.fewer_tangents import without
from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.moves import move_of
from tests.acceptance.door.kinds import Heads
from tests.build import all_reduce, build

aten = torch.ops.aten
TYPES = dict(x="f32[4, 6]", s="f32[4, 6]", t="f32[4, 6]")  # what was saved, and two tangents


def fewer(gm: GraphModule, *missing: int) -> tuple[GraphModule, list[int], list[str]]:
    gm, takes = without(gm, 2, missing)
    return gm, takes, [n.name for n in gm.graph.nodes if n.op == "call_function"]


def two_ways(x, s, t):
    both = aten.add.Tensor(aten.mul(x, s), t)
    return aten.tanh(both), aten.mul(x, t), aten.cat([s, t])


def test_what_depends_on_nothing_but_missing_values_is_none_and_a_sum_has_one_summand_less():
    gm, takes, calls = fewer(build(two_ways, Mesh(dp=2), **TYPES), 2)
    assert (takes, calls) == ([0, 1, 2], ["mul", "tanh", "cat"])  # cat takes zeros beside what is there
    x, s = torch.randn(4, 6), torch.randn(4, 6)
    whole, none, beside = Interpreter(gm).run(x, s, torch.zeros(4, 6))
    assert none is None and torch.equal(whole, (x * s).tanh()) and torch.equal(beside[:4], s)
    gm, takes, calls = fewer(build(two_ways, Mesh(dp=2), **TYPES), 1)
    assert (takes, calls) == ([0, 1, 2], ["tanh", "mul_1", "cat"])
    assert returned(fewer(build(two_ways, Mesh(dp=2), **TYPES), 1, 2)[0]) == [None, None, None]


def reduced(x, s, t):
    return (all_reduce(aten.add.Tensor(s, t), "dp"),)


def test_what_is_left_of_a_sum_is_not_reduced_where_it_lies():
    gm = build(reduced, Mesh(dp=2), **TYPES)
    for node in returned(gm):
        node.kwargs = {"reuse": True}
    assert returned(fewer(gm)[0])[0].kwargs == {"reuse": True}
    assert returned(fewer(gm, 2)[0])[0].kwargs == {"reuse": False}


def test_of_what_moves_at_once_only_what_is_needed_moves():
    """The parameters of one of seven results: their gradients alone are gathered for, bucketed and reduced."""
    for plan in (Replicated(), FullyShard()):
        program = shardc.compile(Heads(), Plan(dp=plan), mesh=Mesh(dp=2)).lower(torch.ones(4, 4).double())
        half = program.halves.backward
        assert half is not None
        every, some = half, without(half, 7, [len(program.halves.saved) + i for i in range(7) if i != 2])[0]
        assert _moved(some) == 2 < _moved(every), plan


def _moved(gm: GraphModule) -> int:
    """How many gradients are reduced."""
    moves = [move for node in gm.graph.nodes if (move := move_of(node)) is not None]
    return sum(len([*move.each()]) for move in moves if move.target in (c.all_reduce, c.reduce_scatter))
