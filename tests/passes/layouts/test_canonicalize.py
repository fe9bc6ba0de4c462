"""Goldens of passes/canonicalize.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.layouts.canonicalize import Canonicalize
from tests.build import apply, build, context, on_one_device, random_inputs

aten = torch.ops.aten
MESH = Mesh(tp=2)
LINEAR = dict(bias="f32[16]", x="f32[8, 4]", w="f32[4, 16]")


def linear(bias, x, w):
    return aten.relu(aten.addmm(bias, x, w))


def batched(bias, x, w):
    return aten.baddbmm(bias, x, w)


def vector(bias, x, w):
    return aten.addmv(bias, x, w)


BATCHED = dict(bias="f32[16]", x="f32[3, 8, 4]", w="f32[3, 4, 16]")
VECTOR = dict(bias="f32[8]", x="f32[8, 4]", w="f32[4]")


def test_a_product_with_a_bias_becomes_a_product_and_a_sum():
    gm = build(linear, MESH, **LINEAR)
    assert apply(Canonicalize(), gm, context(gm, MESH)).changes == {"aten.addmm.default": 1}
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh tp=2
%bias: f32[16] = input
%x: f32[8, 4] = input
%w: f32[4, 16] = input
%mm_default: f32[8, 16] = aten.mm(%x, %w)  # canonicalize
%add_tensor: f32[8, 16] = aten.add.Tensor(%mm_default, %bias)  # canonicalize
%relu: f32[8, 16] = aten.relu(%add_tensor)
return (%relu)""",
    )


@pytest.mark.parametrize(
    ("fn", "types", "product"),
    [(linear, LINEAR, aten.mm), (batched, BATCHED, aten.bmm), (vector, VECTOR, aten.mv)],
)
def test_each_kind_of_product_and_its_values(fn, types, product):
    gm = build(fn, MESH, **types)
    inputs = random_inputs(gm)
    before = on_one_device(gm, inputs)
    apply(Canonicalize(), gm, context(gm, MESH))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"][:2] == [product.default, aten.add.Tensor]
    assert torch.equal(on_one_device(gm, inputs)[0], before[0])  # small integers: no rounding


def test_the_parts_keep_where_the_whole_came_from():
    gm = build(linear, MESH, **LINEAR)
    node = next(n for n in gm.graph.nodes if n.target is aten.addmm.default)
    node.meta |= {"where": "mlp.py:3 in forward", "path": "layers.0"}
    apply(Canonicalize(), gm, context(gm, MESH))
    made = [n for n in gm.graph.nodes if n.op == "call_function"][:2]
    kept = {(n.meta["where"], n.meta["path"], n.meta["phase"]) for n in made}
    assert kept == {("mlp.py:3 in forward", "layers.0", "forward")}


@pytest.mark.parametrize("scales", [{"beta": 2}, {"alpha": 0.5}, {"beta": 1, "alpha": 2}])
def test_left_alone_when_scaled(scales: dict[str, float]):
    gm = build(lambda bias, x, w: aten.addmm(bias, x, w, **scales), MESH, **LINEAR)
    assert not apply(Canonicalize(), gm, context(gm, MESH)).changes


def test_a_scale_of_one_is_no_scale():
    gm = build(lambda bias, x, w: aten.addmm(bias, x, w, beta=1, alpha=1), MESH, **LINEAR)
    assert apply(Canonicalize(), gm, context(gm, MESH)).changes == {"aten.addmm.default": 1}


def test_left_alone_products_without_a_bias():
    gm = build(lambda x, w: aten.mm(x, w), MESH, x="f32[8, 4]", w="f32[4, 16]")
    assert not apply(Canonicalize(), gm, context(gm, MESH)).changes


def test_what_nothing_uses_is_dropped():
    def fn(bias, x, w):
        aten.addmm(bias, x, w)
        return aten.relu(x)

    gm = build(fn, MESH, **LINEAR)
    apply(Canonicalize(), gm, context(gm, MESH))
    assert [n.name for n in gm.graph.nodes if n.op == "call_function"] == ["relu"]


def norm_backward(g, x, mean, rstd, weight, bias):
    back = aten.native_layer_norm_backward(g, x, [4], mean, rstd, weight, bias, [True, True, True])
    return back[0], back[1], back[2]


NORM = dict(g="f32[8, 4]", x="f32[8, 4]", mean="f32[8, 1]", rstd="f32[8, 1]", weight="f32[4]", bias="f32[4]")


@pytest.mark.parametrize(("bias", "taken"), [("f32[4]", 1), ("f64[4]", 0)])
def test_backward_of_a_norm_does_not_read_its_bias(bias, taken):
    gm = build(norm_backward, MESH, **NORM | {"bias": bias})
    inputs = random_inputs(gm)
    before = on_one_device(gm, inputs) if taken else []
    record = apply(Canonicalize(), gm, context(gm, MESH))
    assert record.changes.get("bias for its shape", 0) == taken
    assert bool(next(n for n in gm.graph.nodes if n.name == "bias").users) == (not taken)
    for have, want in zip(on_one_device(gm, inputs) if taken else [], before, strict=True):
        assert torch.equal(have, want)
