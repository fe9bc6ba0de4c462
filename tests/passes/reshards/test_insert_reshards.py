"""Goldens of passes/insert_reshards.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import torch
from expecttest import assert_expected_inline
from torch.distributed.tensor.placement_types import Shard

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.layouts.propagate import Propagate
from shardc.passes.reshards.insert_reshards import InsertReshards
from tests.build import apply, build, context, on_one_device, random_inputs

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)


def run(fn, wish: tuple = (), **types: str):
    """The graph propagated, and with its reshards; wish: of every mark."""
    gm = build(fn, MESH, Stage.TRACED, **types)
    for node in gm.graph.find_nodes(op="call_function", target=MARK):
        node.meta["wish"] = wish
    apply(Propagate(), gm, context(gm, MESH))
    record = apply(InsertReshards(), gm, context(gm, MESH))
    return gm, +Counter(record.changes)


def names(gm) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.op == "call_function"]


def test_a_sum_is_made_explicit_before_an_operator_that_is_not_linear():
    gm, changes = run(lambda x, w: aten.relu(aten.mm(x, w)), x="f32[8@dp, 4@tp]", w="f32[4@tp, 6]")
    assert changes == {"reshard": 1}
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8@dp, 4@tp] = input
%w: f32[4@tp, 6] = input
%mm: f32[8@dp, 6]+tp = aten.mm(%x, %w)
%reshard: f32[8@dp, 6] = shardc.reshard(%mm, [8@dp, 6])  # insert-reshards
%relu: f32[8@dp, 6] = aten.relu(%reshard)
return (%relu)""",
    )


def test_values_do_not_change():
    def fn(x, w, y):
        return aten.relu(aten.add(aten.mm(x, w), y))

    gm, _ = run(fn, x="f32[8@dp, 4@tp]", w="f32[4@tp, 6]", y="f32[8, 6@tp]")
    inputs = random_inputs(gm)
    before = on_one_device(build(fn, MESH, x="f32[8, 4]", w="f32[4, 6]", y="f32[8, 6]"), inputs)
    assert torch.equal(on_one_device(gm, inputs)[0], before[0])


def test_one_reshard_serves_all_uses_in_one_layout():
    def fn(x, w):
        y = aten.mm(x, w)
        return aten.relu(y), aten.exp(y)

    gm, changes = run(fn, x="f32[8, 4@tp]", w="f32[4@tp, 6]")
    assert changes == {"reshard": 1} and names(gm) == ["mm", "reshard", "relu", "exp"]


def test_uses_in_different_layouts_get_a_reshard_each():
    def fn(x, y, z):
        return aten.mul(x, y), aten.mul(x, z)

    gm, changes = run(fn, x="f32[8, 8]+dp", y="f32[8@dp, 8]", z="f32[8, 8@dp]")
    found = [str(n.args[1]) for n in gm.graph.find_nodes(op="call_function", target=c.reshard)]
    assert (changes, found) == ({"reshard": 2}, ["[8@dp, 8]", "[8, 8@dp]"])


def test_an_operand_given_twice_is_resharded_in_both_places():
    gm, changes = run(lambda x: aten.mul(x, x), x="f32[8]+tp")
    (mul,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert [str(n.meta["spec"]) for n in mul.args] == ["[8]+tp", "[8]"]
    assert changes == {"reshard": 1}


def test_operands_in_lists_are_resharded():
    gm, changes = run(lambda x, y: aten.cat([x, y], 1), x="f32[8@dp, 4]", y="f32[8@tp, 4]")
    assert changes == {"reshard": 2}
    (cat,) = gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert {str(n.meta["spec"]) for n in cat.args[0]} == {"[8@dp.tp, 4]"}


def test_a_mark_that_changes_a_layout_becomes_a_reshard_with_its_reason():
    wish = (("tp", Shard(0), False, "tp['net']"),)
    gm, changes = run(lambda x: MARK(aten.relu(x), "net|out|0"), wish, x="f32[8, 4]")
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8, 4] = input
%relu: f32[8, 4] = aten.relu(%x)
%reshard: f32[8@tp, 4] = shardc.reshard(%relu, [8@tp, 4])  # insert-reshards
return (%reshard)""",
    )
    assert changes == {"reshard": 1}
    (node,) = gm.graph.find_nodes(op="call_function", target=c.reshard)
    assert node.meta["why"] == "tp['net']"


def test_a_mark_that_changes_nothing_disappears():
    wish = (("tp", Shard(0), False, ""),)
    gm, changes = run(lambda x: MARK(aten.relu(x), "net|out|0"), wish, x="f32[8@tp, 4]")
    assert (changes, names(gm)) == ({}, ["relu"])


def test_left_alone_when_operands_arrive_as_needed():
    gm, changes = run(lambda x, w: aten.mm(x, w), x="f32[8@dp, 4@tp]", w="f32[4@tp, 6]")
    assert (changes, names(gm)) == ({}, ["mm"])
