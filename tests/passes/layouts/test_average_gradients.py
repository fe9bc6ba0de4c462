"""Goldens of passes/layouts/average_gradients.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.graph import call_nodes, placeholders
from shardc.compiler.ir.node import of
from shardc.compiler.ir.text import text
from shardc.compiler.plan.layout import Layout
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.passes.layouts.average_gradients import AverageGradients
from shardc.passes.layouts.seed_plan import SeedPlan
from tests.build import apply, build, context, on_one_device, param, random_inputs

aten = torch.ops.aten
DP = Mesh(dp=4)
TYPES = dict(x="f32[8, 4]", w="f32[4, 6]", v="f32[6]", tangent="f32[8, 6]")


def layer(x, w, v, tangent):
    y = aten.mm(x, w)
    grad = aten.gelu_backward(tangent, y)
    return aten.gelu(y), aten.mm(aten.t(x), grad), aten.sum.dim_IntList(grad, [0])


def averaged(fn=layer, mesh=DP, gradients=("w", "v"), types=TYPES, early=True, ignored="", **options):
    """The graph, what was divided, and by how many."""
    gm = build(fn, mesh, **types)
    local = {name: frozenset({"dp"}) for name in ignored}
    params = {n.name: param(n, mesh, local=local.get(n.name, frozenset())) for n in placeholders(gm) if n.name in "wv"}
    for node in placeholders(gm):
        del node.meta["spec"]
    ctx = context(gm, mesh, gradients, **{"data_axes": ("dp",), "params": params, **options})
    apply(SeedPlan(), gm, ctx)
    changes = +Counter(apply(AverageGradients(early), gm, ctx).changes)
    return gm, {"".join(changes): {n.name: of(n).divided for n in placeholders(gm) if of(n).divided > 1}}


EARLY = {"tangents": {"tangent": 4}}
LATE = {"gradients": {"w": 4, "v": 4}}


def test_the_tangent_is_divided_instead_of_every_gradient():
    gm, divided = averaged()
    assert divided == EARLY
    assert_expected_inline(
        text(gm, DP),
        """\
mesh dp=4
%x: f32[8@dp, 4] = input
%w: f32[4, 6] = input
%v: f32[6] = input
%tangent: f32[8@dp, 6] = input
%div_tensor: f32[8, 6] = aten.div.Tensor(%tangent, 4)  # average-gradients
%mm: f32[8, 6] = aten.mm(%x, %w)
%gelu_backward: f32[8, 6] = aten.gelu_backward(%div_tensor, %mm)
%gelu: f32[8, 6] = aten.gelu(%mm)
%t: f32[4, 8] = aten.t(%x)
%mm_1: f32[4, 6] = aten.mm(%t, %gelu_backward)
%sum_1: f32[6] = aten.sum.dim_IntList(%gelu_backward, [0])
%reshard: f32[8, 6] = shardc.reshard(%gelu, [8@dp, 6])  # seed-plan
%mark_default: f32[4, 6] = shardc.mark(%mm_1, |gradient|w|)  # seed-plan
%mark_default_1: f32[6] = shardc.mark(%sum_1, |gradient|v|)  # seed-plan
return (%reshard, %mark_default, %mark_default_1)""",
    )


def test_every_gradient_is_divided_behind_its_mark():
    gm, divided = averaged(early=False)
    assert divided == LATE
    assert_expected_inline(
        text(gm, DP),
        """\
mesh dp=4
%x: f32[8@dp, 4] = input
%w: f32[4, 6] = input
%v: f32[6] = input
%tangent: f32[8@dp, 6] = input
%mm: f32[8, 6] = aten.mm(%x, %w)
%gelu_backward: f32[8, 6] = aten.gelu_backward(%tangent, %mm)
%gelu: f32[8, 6] = aten.gelu(%mm)
%t: f32[4, 8] = aten.t(%x)
%mm_1: f32[4, 6] = aten.mm(%t, %gelu_backward)
%sum_1: f32[6] = aten.sum.dim_IntList(%gelu_backward, [0])
%reshard: f32[8, 6] = shardc.reshard(%gelu, [8@dp, 6])  # seed-plan
%mark_default: f32[4, 6] = shardc.mark(%mm_1, |gradient|w|)  # seed-plan
%div_tensor: f32[4, 6] = aten.div.Tensor(%mark_default, 4)  # average-gradients
%mark_default_1: f32[6] = shardc.mark(%sum_1, |gradient|v|)  # seed-plan
%div_tensor_1: f32[6] = aten.div.Tensor(%mark_default_1, 4)  # average-gradients
return (%reshard, %div_tensor, %div_tensor_1)""",
    )


@pytest.mark.parametrize("early", [True, False])
def test_gradients_are_divided_and_nothing_else_is(early: bool):
    inputs = random_inputs(build(layer, DP, **TYPES))
    out, *gradients = on_one_device(averaged(early=early)[0], inputs)
    want, *sums = on_one_device(build(layer, DP, **TYPES), inputs)
    assert torch.equal(out, want)
    assert all(torch.equal(have * 4, total) for have, total in zip(gradients, sums, strict=True))


def test_left_alone_where_no_data_parallel_mesh_dim_splits_an_output():
    for options in ({"data_axes": ()}, {"outputs": Layout()}, {"mesh": Mesh(dp=1)}):
        gm, divided = averaged(**options)
        assert divided == {"": {}} and not call_nodes(gm, aten.div.Tensor)


def test_with_a_loss_beside_split_results_what_comes_in_for_those_is_divided():
    def fn(x, w, v, tangent, tangent1):
        out, dw, dv = layer(x, w, v, aten.add(tangent, tangent1))
        return out, aten.sum(out), aten.clamp(dw, -1.0, 1.0), dv, aten.mul(x, tangent1)

    gm, divided = averaged(fn, types={**TYPES, "tangent1": "f32[]"}, gradients=("w", "v", "x"))
    assert divided == EARLY
    assert [n.args[0].name for n in call_nodes(gm, aten.div.Tensor)] == ["tangent"]


# ---- not where backward starts from


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
def test_a_backward_that_is_not_linear(fn):
    assert averaged(fn)[1] == LATE


def test_numbers_of_ranks_by_which_division_rounds():
    types = {**TYPES, "x": "f32[6, 4]", "tangent": "f32[6, 6]"}
    assert averaged(mesh=Mesh(dp=3), types=types)[1] == {"gradients": {"w": 3, "v": 3}}


def test_the_gradient_of_an_input_is_each_ranks_own():
    def also_of_x(x, w, v, tangent):
        out, dw, dv = layer(x, w, v, tangent)
        return out, dw, dv, aten.mm(tangent, aten.t(w))

    assert averaged(also_of_x, gradients=("w", "v", "x"))[1] == LATE


def test_an_ignored_parameter_is_not_averaged():
    assert averaged(ignored="w")[1] == {"gradients": {"v": 4}}


def test_what_is_larger_than_the_gradients():
    assert averaged(types={**TYPES, "x": "f32[64, 4]", "tangent": "f32[64, 6]"})[1] == LATE


def test_float16_which_underflows():
    assert averaged(types={name: given.replace("f32", "f16") for name, given in TYPES.items()})[1] == LATE
    assert averaged(reduce_dtype={"dp": torch.float16})[1] == LATE
    assert averaged(reduce_dtype={"dp": torch.bfloat16})[1] == EARLY  # as wide as float32


# ---- gradients kept back at unsynchronised steps


@pytest.mark.parametrize("keep", ["v", "wv"])
def test_what_is_kept_back_is_averaged_already(keep: str):
    for early, divided in ((True, EARLY), (False, LATE)):
        assert averaged(early=early, keep=frozenset(keep))[1] == divided


@pytest.mark.parametrize("early", [True, False])
def test_what_was_kept_back_is_added_to_what_is_averaged(early: bool):
    def fn(x, w, v, tangent, carry_w):
        out, dw, dv = layer(x, w, v, tangent)
        return out, aten.add(dw, carry_w), dv

    types = {**TYPES, "carry_w": "f32[4, 6]"}
    carries = {"w": Spec.whole((4, 6)).with_pending({"dp": "sum"}, DP)}
    gm, divided = averaged(fn, types=types, early=early, carries=carries)
    assert divided == (EARLY if early else LATE)
    given = random_inputs(gm)
    _, dw, dv = on_one_device(build(layer, DP, **TYPES), given[:-1])
    _, *have = on_one_device(gm, given)
    torch.testing.assert_close(have, [dw / 4 + given[-1], dv / 4])
