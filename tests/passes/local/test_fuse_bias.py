"""Goldens of passes/fuse_bias.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.fuse_bias import FuseBias
from tests.build import all_reduce, apply, context, local, random_inputs, simulated

aten = torch.ops.aten
TP = Mesh(tp=2)
TYPES = dict(x="f32[8, 4]", w="f32[4, 6@tp]", b="f32[6@tp]")
ROWS = dict(x="f32[8, 4@tp]", w="f32[4@tp, 6]", b="f32[6]")


def fused(fn, /, **types: str):
    gm = local(fn, TP, **types or TYPES)
    record = apply(FuseBias(), gm, context(gm, TP))
    return gm, +Counter(record.changes)


def column_parallel(x, w, b):
    return aten.relu(aten.add(aten.mm(x, w), b)), aten.exp(aten.add(b, aten.mm(aten.relu(x), w)))


def test_a_bias_on_either_side_joins_its_product():
    gm, changes = fused(column_parallel)
    assert changes == {"biases": 2}
    assert_expected_inline(
        text(gm, TP),
        """\
mesh tp=2
%x: f32[8, 4] = input
%w: f32[4, 6@tp] = input
%b: f32[6@tp] = input
%add: f32[8, 6@tp] = aten.addmm(%b, %x, %w)  # fuse-bias
%relu: f32[8, 6@tp] = aten.relu(%add)
%relu_1: f32[8, 4] = aten.relu(%x)
%add_1: f32[8, 6@tp] = aten.addmm(%b, %relu_1, %w)  # fuse-bias
%exp: f32[8, 6@tp] = aten.exp(%add_1)
return (%relu, %exp)""",
    )


def test_values_do_not_change():
    gm, _ = fused(column_parallel)
    inputs = random_inputs(gm)
    before = local(column_parallel, TP, **TYPES)
    for have, want in zip(simulated(gm, TP, inputs), simulated(before, TP, inputs), strict=True):
        assert torch.equal(have, want)


def reduced_between(x, w, b):
    return aten.add(all_reduce(aten.mm(x, w), "tp"), b)


def product_also_used(x, w, b):
    y = aten.mm(x, w)
    return aten.add(y, b), aten.relu(y)


def scaled(x, w, b):
    return aten.add(aten.mm(x, w), b, alpha=2)


def whole_matrix(x, w, b):
    y = aten.add(x, b)
    return aten.add(aten.mm(x, w), y)


@pytest.mark.parametrize(
    ("fn", "types"),
    [
        (reduced_between, ROWS),
        (product_also_used, TYPES),
        (scaled, TYPES),
        (whole_matrix, dict(x="f32[6, 6]", w="f32[6, 6]", b="f32[6]")),
        (column_parallel, {**TYPES, "b": "f32[1]"}),
        (column_parallel, {**TYPES, "b": "f64[6@tp]"}),
    ],
)
def test_left_alone(fn, types):
    assert not fused(fn, **types)[1]


def test_left_alone_across_halves():
    gm = local(column_parallel, TP, **TYPES)
    for node in gm.graph.nodes:
        if node.target is aten.add.Tensor:
            node.meta["phase"] = "backward"
    assert not +Counter(apply(FuseBias(), gm, context(gm, TP)).changes)
