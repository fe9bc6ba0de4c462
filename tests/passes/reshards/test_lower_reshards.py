"""Goldens of passes/lower_reshards.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.reshards.lower_reshards import LowerReshards
from tests.build import apply, build, context, on_one_device, random_inputs, reshard, simulated

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)


def lowered(source: str, target: str, fn=None):
    fn = fn or (lambda x: reshard(x, target))
    gm = build(fn, MESH, Stage.RESHARDED, x=source)
    record = apply(LowerReshards(), gm, context(gm, MESH))
    return gm, +Counter(record.changes)


def test_a_reshard_becomes_the_one_collective_that_does_it():
    gm, changes = lowered("f32[8@dp, 16]+tp", "[8@dp, 16@tp]")
    assert changes == {"reduce_scatter": 1}
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8@dp, 16]+tp = input
%reduce_scatter: f32[8@dp, 16@tp] = shardc.reduce_scatter(%x, 1, tp)  # lower-reshards
return (%reduce_scatter)""",
    )


def test_a_reshard_becomes_several_moves():
    gm, changes = lowered("f32[8@dp.tp, 6]", "[8, 6@dp]")
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8@dp.tp, 6] = input
%all_gather: f32[8@dp, 6] = shardc.all_gather(%x, 0, tp)  # lower-reshards
%all_to_all: f32[8, 6@dp] = shardc.all_to_all(%all_gather, 0, 1, dp)  # lower-reshards
return (%all_to_all)""",
    )


def test_a_reduction_other_than_the_sum_is_named():
    gm, _ = lowered("f32[8]+max(tp)", "[8]")
    assert "shardc.all_reduce(%x, tp, max)" in text(gm, MESH)


def test_nothing_to_do_leaves_nothing():
    gm, changes = lowered("f32[8@dp]", "[8@dp]")
    assert changes == {} and [n.op for n in gm.graph.nodes] == ["placeholder", "output"]


def test_reasons_and_sources_are_kept():
    gm = build(lambda x: reshard(aten.relu(x), "[8]"), MESH, Stage.RESHARDED, x="f32[8@dp.tp]")
    (node,) = gm.graph.find_nodes(op="call_function", target=c.reshard)
    node.meta |= {"why": "the plan", "where": "mlp.py:3 in forward"}
    apply(LowerReshards(), gm, context(gm, MESH))
    gathers = gm.graph.find_nodes(op="call_function", target=c.all_gather)
    kept = [(n.meta["why"], n.meta["where"], n.meta["phase"]) for n in gathers]
    assert kept == [("the plan", "mlp.py:3 in forward", "forward")] * 2


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("f64[8@dp, 6]+tp", "[8, 6@tp]"),
        ("f64[7@dp.tp, 5]", "[7, 5@tp.dp]"),
        ("f64[(3@tp 4), 5@dp]", "[12@dp, 5@tp]"),
        ("f64[12@tp]+dp", "[(3 4@dp)]"),
        ("f64[5]", "[5@tp]+dp"),
    ],
)
def test_values_do_not_change_on_one_device_or_on_many(source: str, target: str):
    gm, _ = lowered(source, target)
    inputs = random_inputs(gm)
    assert torch.equal(on_one_device(gm, inputs)[0], inputs[0])
    assert torch.equal(simulated(gm, MESH, inputs)[0], inputs[0])


def test_left_alone_all_other_calls():
    gm, changes = lowered("f32[8@dp]", "", lambda x: aten.relu(x))
    assert changes == {} and [n.name for n in gm.graph.nodes][1:-1] == ["relu"]
