"""Goldens of passes/predivide.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.graph import placeholders
from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.layouts.predivide import Predivide
from shardc.passes.layouts.seed_plan import SeedPlan
from tests.build import apply, build, context, on_one_device, param, random_inputs

aten = torch.ops.aten
DP = Mesh(dp=4)
TYPES = dict(x="f32[8, 4]", w="f32[4, 6]", v="f32[6]", tangent="f32[8, 6]")


def layer(x, w, v, tangent):
    y = aten.mm(x, w)
    grad = aten.gelu_backward(tangent, y)
    return aten.gelu(y), aten.mm(aten.t(x), grad), aten.sum.dim_IntList(grad, [0])


def predivided(fn=layer, mesh=DP, gradients=("w", "v"), types=TYPES, **options):
    gm = build(fn, mesh, **types)
    params = {n.name: param(n, mesh) for n in placeholders(gm) if n.name in "wv"}
    for node in placeholders(gm):
        del node.meta["spec"]
    ctx = context(gm, mesh, gradients, **{"data_axes": ("dp",), "average": True, "params": params, **options})
    apply(SeedPlan(), gm, ctx)
    return gm, +Counter(apply(Predivide(), gm, ctx).changes)


def test_the_tangent_is_divided_instead_of_every_gradient():
    gm, changes = predivided()
    assert changes == {"tangents": 1, "gradients": 2}
    assert_expected_inline(
        text(gm, DP),
        """\
mesh dp=4
%x: f32[8@dp, 4] = input
%w: f32[4, 6] = input
%v: f32[6] = input
%tangent: f32[8@dp, 6] = input
%div_tensor_2: f32[8, 6] = aten.div.Tensor(%tangent, 4)  # predivide
%mm: f32[8, 6] = aten.mm(%x, %w)
%gelu_backward: f32[8, 6] = aten.gelu_backward(%div_tensor_2, %mm)
%gelu: f32[8, 6] = aten.gelu(%mm)
%t: f32[4, 8] = aten.t(%x)
%mm_1: f32[4, 6] = aten.mm(%t, %gelu_backward)
%sum_1: f32[6] = aten.sum.dim_IntList(%gelu_backward, [0])
%reshard: f32[8, 6] = shardc.reshard(%gelu, [8@dp, 6])  # seed-plan
%mark_default: f32[4, 6] = shardc.mark(%mm_1, |gradient|w|)  # seed-plan
%mark_default_1: f32[6] = shardc.mark(%sum_1, |gradient|v|)  # seed-plan
return (%reshard, %mark_default, %mark_default_1)""",
    )


def test_values_do_not_change():
    inputs = random_inputs(build(layer, DP, **TYPES))
    out, *gradients = on_one_device(predivided()[0], inputs)
    want, *sums = on_one_device(predivided(average=False)[0], inputs)
    assert torch.equal(out, want)
    assert all(torch.equal(have * 4, total) for have, total in zip(gradients, sums, strict=True))


def clamped(x, w, v, tangent):
    out, dw, dv = layer(x, w, v, tangent)
    return out, aten.clamp(dw, -1.0, 1.0), dv


def decayed(x, w, v, tangent):
    """The gradient of w has a part that does not come from the tangent."""
    out, dw, dv = layer(x, w, v, tangent)
    return out, aten.add(dw, w), dv


def squared(x, w, v, tangent):
    out, dw, dv = layer(x, w, v, tangent)
    return out, aten.mul(dw, dw), dv


def constant(x, w, v, tangent):
    out, dw, _ = layer(x, w, v, tangent)
    return out, dw, aten.mul(v, 0.5)


@pytest.mark.parametrize("fn", [clamped, decayed, squared, constant])
def test_left_alone_a_backward_that_is_not_linear(fn):
    assert not predivided(fn)[1]


def test_left_alone_numbers_of_ranks_by_which_division_rounds():
    assert not predivided(mesh=Mesh(dp=3), types={**TYPES, "x": "f32[6, 4]", "tangent": "f32[6, 6]"})[1]


def test_left_alone_gradients_that_are_not_averaged_here():
    assert not predivided(average=False)[1]
    assert not predivided(keep=frozenset({"v"}))[1]  # kept back: divided when it is reduced
    assert not predivided(keep=frozenset({"v", "w"}))[1]


def test_left_alone_the_gradient_of_an_input_which_is_each_ranks_own():
    def also_of_x(x, w, v, tangent):
        out, dw, dv = layer(x, w, v, tangent)
        return out, dw, dv, aten.mm(tangent, aten.t(w))

    assert not predivided(also_of_x, gradients=("w", "v", "x"))[1]


def test_left_alone_what_is_larger_than_the_gradients():
    assert not predivided(types={**TYPES, "x": "f32[64, 4]", "tangent": "f32[64, 6]"})[1]


def test_left_alone_float16_which_underflows():
    assert not predivided(types={name: given.replace("f32", "f16") for name, given in TYPES.items()})[1]
    assert not predivided(reduce_dtype={"dp": torch.float16})[1]
    assert predivided(reduce_dtype={"dp": torch.bfloat16})[1]  # as wide as float32
