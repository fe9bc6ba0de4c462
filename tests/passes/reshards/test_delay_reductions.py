"""Goldens of passes/delay_reductions.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.reshards.delay_reductions import DelayReductions
from tests.build import all_reduce, apply, build, context, on_one_device, random_inputs, reduce_scatter

aten = torch.ops.aten
MESH = Mesh(tp=2, cp=2)
TYPES = dict(x="f32[8, 4]", a="f32[8, 16@tp]", b="f32[8, 16@tp]", w="f32[16@tp, 4]")


def delayed(fn, /, **types: str):
    gm = build(fn, MESH, Stage.RESHARDED, **(types or TYPES))
    record = apply(DelayReductions(), gm, context(gm, MESH))
    return gm, +Counter(record.changes)


def parallel_branches(x, a, b, w):
    y = aten.add(x, all_reduce(aten.mm(a, w), "tp"))
    return aten.relu(aten.add(y, all_reduce(aten.mm(b, w), "tp")))


def test_two_branches_beside_a_residual_are_reduced_once():
    gm, changes = delayed(parallel_branches)
    assert changes == {"reductions": 1}
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh tp=2 cp=2
%x: f32[8, 4] = input
%a: f32[8, 16@tp] = input
%b: f32[8, 16@tp] = input
%w: f32[16@tp, 4] = input
%mm: f32[8, 4]+tp = aten.mm(%a, %w)
%mm_1: f32[8, 4]+tp = aten.mm(%b, %w)
%add_tensor: f32[8, 4]+tp = aten.add.Tensor(%mm, %mm_1)  # delay-reductions
%all_reduce_2: f32[8, 4] = shardc.all_reduce(%add_tensor, tp)  # delay-reductions
%add_tensor_1: f32[8, 4] = aten.add.Tensor(%x, %all_reduce_2)  # delay-reductions
%relu: f32[8, 4] = aten.relu(%add_tensor_1)
return (%relu)""",
    )


def scattered_branches(x, a, b, w):
    return aten.add(reduce_scatter(aten.mm(a, w), 0, "tp"), reduce_scatter(aten.mm(b, w), 0, "tp"))


def test_scattered_sums_likewise():
    gm, changes = delayed(scattered_branches)
    assert changes == {"reductions": 1}
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh tp=2 cp=2
%x: f32[8, 4] = input
%a: f32[8, 16@tp] = input
%b: f32[8, 16@tp] = input
%w: f32[16@tp, 4] = input
%mm: f32[8, 4]+tp = aten.mm(%a, %w)
%mm_1: f32[8, 4]+tp = aten.mm(%b, %w)
%add_tensor: f32[8, 4]+tp = aten.add.Tensor(%mm, %mm_1)  # delay-reductions
%reduce_scatter_2: f32[8@tp, 4] = shardc.reduce_scatter(%add_tensor, 0, tp)  # delay-reductions
return (%reduce_scatter_2)""",
    )


def three_branches(x, a, b, w):
    first, second, third = (all_reduce(aten.mm(y, w), "tp") for y in (a, b, aten.relu(a)))
    return aten.add(aten.add(first, x), aten.add(second, third))


def one_branch(x, a, b, w):
    return aten.add(x, all_reduce(aten.mm(a, w), "tp")), all_reduce(aten.mm(b, w), "tp")


def reduction_also_used(x, a, b, w):
    y = all_reduce(aten.mm(a, w), "tp")
    return aten.add(y, all_reduce(aten.mm(b, w), "tp")), y


def sum_also_used(x, a, b, w):
    y = aten.add(x, all_reduce(aten.mm(a, w), "tp"))
    return aten.add(y, all_reduce(aten.mm(b, w), "tp")), y


def scaled(x, a, b, w):
    return aten.add(all_reduce(aten.mm(a, w), "tp"), all_reduce(aten.mm(b, w), "tp"), alpha=2)


def maxima(x, a, b, w):
    return aten.add(all_reduce(aten.amax(a, [1]), "tp", "max"), all_reduce(aten.amax(b, [1]), "tp", "max"))


def broadcast_summand(x, a, b, w):
    return aten.add(all_reduce(aten.mm(a, w), "tp"), all_reduce(aten.sum(aten.mm(b, w), [0], True), "tp"))


def over_two_mesh_dims(x, a, b, w, c, v):
    return aten.add(all_reduce(aten.mm(a, w), "tp"), all_reduce(aten.mm(c, v), "cp"))


def of_two_dtypes(x, a, b, w, c, v):
    return aten.add(all_reduce(aten.mm(a, w), "tp"), all_reduce(aten.mm(c, v), "tp"))


def of_two_halves(x, a, b, w, tangent):
    return aten.add(all_reduce(aten.mm(a, w), "tp"), all_reduce(aten.mm(tangent, w), "tp"))


@pytest.mark.parametrize(
    ("fn", "more"),
    [
        (one_branch, {}),
        (reduction_also_used, {}),
        (sum_also_used, {}),
        (scaled, {}),
        (maxima, {}),
        (broadcast_summand, {}),
        (over_two_mesh_dims, dict(c="f32[8, 16@cp]", v="f32[16@cp, 4]")),
        (of_two_dtypes, dict(c="f64[8, 16@tp]", v="f64[16@tp, 4]")),
        (of_two_halves, dict(tangent="f32[8, 16@tp]")),
    ],
)
def test_left_alone(fn, more):
    assert not delayed(fn, **TYPES, **more)[1]


@pytest.mark.parametrize("fn", [parallel_branches, scattered_branches, three_branches])
def test_values_do_not_change(fn):
    gm, changes = delayed(fn)
    assert changes
    inputs = random_inputs(gm)
    before = on_one_device(build(fn, MESH, Stage.RESHARDED, **TYPES), inputs)
    for have, want in zip(on_one_device(gm, inputs), before, strict=True):
        assert torch.equal(have, want)
