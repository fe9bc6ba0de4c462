"""Goldens of passes/reduce_in_place.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.overlap import Overlap
from shardc.passes.local.reduce_in_place import ReduceInPlace
from tests.build import all_reduce, apply, context, local, random_inputs, simulated

aten = torch.ops.aten
DP = Mesh(dp=2)
TYPES = dict(x="f32[8@dp, 4]", w="f32[4, 4]", tangent="f32[8@dp, 4]")


def reduced(fn, mesh: Mesh = DP, meta: dict | None = None, /, **types: str):
    gm = local(fn, mesh, **TYPES | types)
    ctx = context(gm, mesh)
    apply(Overlap(), gm, ctx)
    for node in gm.graph.nodes:
        node.meta |= meta or {}
    record = apply(ReduceInPlace(), gm, ctx)
    return gm, +Counter(record.changes)


def dead_operand(x, w, tangent):
    grad = all_reduce(aten.view(aten.mm(aten.t(x), tangent), [2, 8]), "dp")
    return aten.mm(x, w), grad


def test_an_operand_that_nothing_else_needs_is_reduced_where_it_lies():
    gm, changes = reduced(dead_operand)
    assert changes == {"reused": 1}
    assert_expected_inline(
        text(gm, DP),
        """\
mesh dp=2
%x: f32[8@dp, 4] = input
%w: f32[4, 4] = input
%tangent: f32[8@dp, 4] = input
%t: f32[4, 8@dp] = aten.t(%x)
%mm: f32[4, 4]+dp = aten.mm(%t, %tangent)
%view: f32[2, 8]+dp = aten.reshape(%mm, [2, 8])
%start_all_reduce: f32[2, 8] = shardc.start(%view, all_reduce, dp, reuse=True)  # overlap
%mm_1: f32[8@dp, 4] = aten.mm(%x, %w)
%all_reduce: f32[2, 8] = shardc.wait(%start_all_reduce)
return (%mm_1, %all_reduce)""",
    )


def test_values_do_not_change():
    gm, _ = reduced(dead_operand)
    before = local(dead_operand, DP, **TYPES)
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, DP, inputs), simulated(before, DP, inputs), strict=True):
        assert torch.equal(have, want)


def over_two_mesh_dims(x, w, tangent):
    grad = all_reduce(all_reduce(aten.mm(aten.t(x), tangent), "pod"), "dp")
    return aten.mm(x, w), grad


def test_what_one_reduction_gave_the_next_reduces_where_it_lies():
    split = dict(x="f32[8@pod.dp, 4]", tangent="f32[8@pod.dp, 4]")
    assert reduced(over_two_mesh_dims, Mesh(pod=2, dp=2), **split)[1] == {"reused": 2}
    assert not reduced(over_two_mesh_dims, Mesh(pod=1, dp=1), **split)[1]


def test_left_alone_what_one_reduction_gave_where_it_is_used_again():
    def twice(x, w, tangent):
        first = all_reduce(aten.mm(aten.t(x), tangent), "pod")
        return all_reduce(first, "dp"), aten.neg(first)

    split = dict(x="f32[8@pod.dp, 4]", tangent="f32[8@pod.dp, 4]")
    assert reduced(twice, Mesh(pod=2, dp=2), **split)[1] == {"reused": 1}


def an_input(x, w, tangent):
    return all_reduce(w, "dp")


def a_view_of_an_input(x, w, tangent):
    return all_reduce(aten.t(w), "dp")


def returned(x, w, tangent):
    grad = aten.mm(aten.t(x), tangent)
    return all_reduce(grad, "dp"), grad


def used_afterwards(x, w, tangent):
    grad = aten.mm(aten.t(x), tangent)
    total = all_reduce(grad, "dp")
    return aten.mm(total, grad)


def another_view_used_afterwards(x, w, tangent):
    grad = aten.mm(aten.t(x), tangent)
    other = aten.view(grad, [2, 8])
    total = all_reduce(grad, "dp")
    return aten.mm(total, total), aten.neg(other)


@pytest.mark.parametrize("fn", [returned, used_afterwards, another_view_used_afterwards])
def test_left_alone(fn):
    assert not reduced(fn)[1]


@pytest.mark.parametrize("fn", [an_input, a_view_of_an_input])
def test_left_alone_where_it_is_an_input(fn):
    assert not reduced(fn, w="f32[4, 4]+dp")[1]


def test_left_alone_where_backward_computes_it_again():
    assert not reduced(dead_operand, DP, {"region": "layers.0"})[1]


def test_left_alone_on_a_mesh_dim_of_one_rank():
    assert not reduced(dead_operand, Mesh(dp=1))[1]
