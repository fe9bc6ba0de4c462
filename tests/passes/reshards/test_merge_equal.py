"""Goldens of passes/merge_equal.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.reshards.merge_equal import MergeEqual
from tests.build import all_gather, apply, build, context, on_one_device, random_inputs, reshard

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)
TYPES = dict(x="f32[8@dp, 4]", w="f32[4, 4@tp]")


def merged(fn, meta: dict | None = None, /, **types: str):
    gm = build(fn, MESH, Stage.RESHARDED, **(types or TYPES))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta |= meta or {}
    record = apply(MergeEqual(), gm, context(gm, MESH))
    return gm, +Counter(record.changes)


def names(gm) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.op == "call_function"]


def gathered_twice(x, w):
    return aten.relu(aten.mm(x, all_gather(w, 1, "tp"))), aten.exp(aten.mm(x, all_gather(w, 1, "tp")))


def test_equal_calls_on_equal_operands_are_one():
    gm, changes = merged(gathered_twice)
    assert changes == {"merged": 2}  # the gather, and then the product
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8@dp, 4] = input
%w: f32[4, 4@tp] = input
%all_gather: f32[4, 4] = shardc.all_gather(%w, 1, tp)
%mm: f32[8@dp, 4] = aten.mm(%x, %all_gather)
%relu: f32[8@dp, 4] = aten.relu(%mm)
%exp: f32[8@dp, 4] = aten.exp(%mm)
return (%relu, %exp)""",
    )


def test_values_do_not_change():
    gm, _ = merged(gathered_twice)
    inputs = random_inputs(gm)
    before = on_one_device(build(gathered_twice, MESH, **TYPES), inputs)
    for have, want in zip(on_one_device(gm, inputs), before, strict=True):
        assert torch.equal(have, want)


def test_lists_keywords_and_layouts_are_compared():
    def fn(x, w):
        views = aten.view(x, [32]), aten.view(x, [32])
        casts = [aten._to_copy(v, dtype=torch.float64) for v in views]
        return aten.add(*casts), aten.sum(reshard(x, "[8, 4]")), aten.sum(reshard(x, "[8, 4]"))

    _, changes = merged(fn)
    assert changes == {"merged": 4}


def test_one_and_true_and_a_float_are_different():
    def fn(x, w):
        return aten.mul(x, 1), aten.mul(x, 1.0), aten.mul(x, True)

    assert merged(fn)[1] == {}


# ---- left alone


def other_operand(x, w):
    return aten.relu(x), aten.relu(w)


def other_argument(x, w):
    return aten.sum(x, [0]), aten.sum(x, [1])


def other_keyword(x, w):
    return aten._to_copy(x, dtype=torch.float64), aten._to_copy(x, dtype=torch.float16)


def other_layout(x, w):
    return reshard(x, "[8, 4]"), reshard(x, "[8, 4@dp]")


def other_mesh_dim(x, w):
    return all_gather(x, 0, "dp"), all_gather(x, 1, "tp")


def draws(x, w):
    return aten.rand_like(x), aten.rand_like(x)


@pytest.mark.parametrize("fn", [other_operand, other_argument, other_keyword, other_layout])
def test_left_alone(fn):
    gm, changes = merged(fn)
    assert changes == {} and len(names(gm)) == 2


def test_left_alone_where_numbers_are_drawn():
    gm, changes = merged(draws, x="f32[8, 4]", w="f32[4]")
    assert changes == {} and len(names(gm)) == 2


def test_left_alone_over_another_mesh_dim():
    _, changes = merged(other_mesh_dim, x="f32[8@dp, 4@tp]", w="f32[4]")
    assert changes == {}


def both_ways(x, w, tangent):
    return aten.mm(x, all_gather(w, 1, "tp")), aten.mm(tangent, all_gather(w, 1, "tp"))


BOTH = TYPES | {"tangent": "f32[8@dp, 4]"}


@pytest.mark.parametrize("key", ["regather", "region"])
def test_left_alone_what_backward_makes_again_on_purpose(key: str):
    def fn(x, w, tangent):
        return aten.relu(x), aten.mul(aten.relu(x), tangent)

    gm = build(fn, MESH, Stage.RESHARDED, **BOTH)
    first, second = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    for node in (first, second):
        node.meta[key] = True
    second.meta["phase"] = "backward"
    assert not +Counter(apply(MergeEqual(), gm, context(gm, MESH)).changes)


def test_what_is_kept_for_backward_is_one():
    _, changes = merged(both_ways, **BOTH)
    assert changes == {"merged": 1}
