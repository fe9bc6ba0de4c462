"""Each invariant broken once, and named. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir import collectives as c
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from tests.build import all_gather, all_reduce, all_to_all, build, local_slice, make_partial, parse, reduce_scatter

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)
TYPES = dict(x="f32[8@dp, 4@tp]", w="f32[4@tp, 6]")


def layer(x, w):
    return aten.relu(all_reduce(aten.mm(x, w), "tp"))


def graph(stage: Stage = Stage.RESHARDED) -> GraphModule:
    return build(layer, MESH, stage, **TYPES)


def node(gm: GraphModule, name: str):
    return next(n for n in gm.graph.nodes if n.name == name)


def refused(gm: GraphModule, stage: Stage = Stage.RESHARDED) -> str:
    with pytest.raises(ShardingError) as error:
        verify(gm, stage, MESH)
    return error.value.what


@pytest.mark.parametrize("stage", list(Stage))
def test_a_sound_graph_passes(stage: Stage):
    verify(graph(), stage, MESH)


def test_the_whole_text_of_a_broken_invariant():
    gm = graph()
    node(gm, "relu").args = (node(gm, "mm"),)
    node(gm, "relu").meta["where"] = "mlp.py:3 in forward"
    with pytest.raises(ShardingError) as error:
        verify(gm, Stage.RESHARDED, MESH)
    assert_expected_inline(
        str(error.value),
        """\
sharding error: %relu needs operand 0 as [8@dp, 6], but %mm is [8@dp, 6]+tp
  --> mlp.py:3 in forward
   |   %all_reduce: f32[8@dp, 6] = shardc.all_reduce(%mm, tp)
   | > %relu: f32[8@dp, 6] = aten.relu(%mm)
   = help: this is a fault of the compiler, or of an edited program: a value would be wrong""",
    )


def test_a_call_without_a_value():
    gm = graph()
    del node(gm, "mm").meta["val"]
    assert refused(gm, Stage.TRACED) == "%mm has no value"


def test_a_value_without_a_layout():
    gm = graph()
    del node(gm, "mm").meta["spec"]
    assert refused(gm, Stage.SHARDED) == "%mm has 1 values and 0 layouts"


def test_layouts_are_not_asked_for_before_propagation_or_inside_local_forms():
    gm = graph()
    del node(gm, "mm").meta["spec"]
    verify(gm, Stage.TRACED, MESH)
    verify(gm, Stage.LOCAL, MESH)


def test_a_layout_of_another_shape():
    gm = graph()
    node(gm, "mm").meta["spec"] = Spec.whole((8, 7))
    assert refused(gm, Stage.SHARDED) == "%mm has shape (8, 6) and layout [8, 7]"


@pytest.mark.parametrize("text", ["[8@tp, 6@tp]", "[8@tp, 6]+tp"])
def test_a_mesh_dim_used_twice(text: str):
    gm = graph()
    node(gm, "mm").meta["spec"] = parse(text, MESH)[1]
    assert refused(gm, Stage.SHARDED) == f"%mm uses a mesh dim twice: {text}"


def test_an_operand_in_another_layout_than_needed():
    gm = graph()
    node(gm, "relu").args = (node(gm, "mm"),)
    assert refused(gm) == "%relu needs operand 0 as [8@dp, 6], but %mm is [8@dp, 6]+tp"


def test_operands_may_disagree_before_reshards_are_inserted():
    gm = graph()
    node(gm, "relu").args = (node(gm, "mm"),)
    verify(gm, Stage.SHARDED, MESH)


def test_a_graph_that_fx_would_not_run():
    gm = graph()
    node(gm, "relu").append(node(gm, "all_reduce"))
    with pytest.raises(RuntimeError, match="before it has been defined"):
        verify(gm, Stage.TRACED, MESH)


# ---- collectives

MOVES = {
    "all_gather": (lambda x: all_gather(x, 0, "dp"), "[8@dp, 4]", "[8, 4]"),
    "all_reduce": (lambda x: all_reduce(x, "tp"), "[8@dp, 4]+tp", "[8@dp, 4]"),
    "reduce_scatter": (lambda x: reduce_scatter(x, 1, "tp"), "[8@dp, 4]+tp", "[8@dp, 4@tp]"),
    "all_to_all": (lambda x: all_to_all(x, 0, 1, "dp"), "[8@dp, 4]", "[8, 4@dp]"),
    "local_slice": (lambda x: local_slice(x, 1, "tp"), "[8@dp, 4]", "[8@dp, 4@tp]"),
    "make_partial": (lambda x: make_partial(x, "tp"), "[8@dp, 4]", "[8@dp, 4]+tp"),
}
CLAIMS = ["[8@dp, 4]", "[8@tp, 4@dp]", "[8, 4]", "[8@dp, 4@tp]", "[8, 4@dp]", "[8@dp, 4]+tp"]
WRONG = [(name, claim) for name, (_, _, right) in MOVES.items() for claim in CLAIMS if claim != right]


@pytest.mark.parametrize("name", MOVES)
def test_a_move_that_does_what_its_name_says(name: str):
    fn, before, after = MOVES[name]
    gm = build(fn, MESH, Stage.RESHARDED, x=f"f32{before}")
    verify(gm, Stage.RESHARDED, MESH)
    assert str(node(gm, name).meta["spec"]) == after


@pytest.mark.parametrize(("name", "claim"), WRONG)
def test_a_move_that_claims_something_else(name: str, claim: str):
    fn, before, _ = MOVES[name]
    gm = build(fn, MESH, Stage.RESHARDED, x=f"f32{before}")
    node(gm, name).meta["spec"] = parse(claim, MESH)[1]
    assert refused(gm) == f"%{name} cannot turn {before} into {claim}"


def broken(before: str, after: str, target, *args) -> str:
    gm = build(lambda x: all_gather(x, 0, "dp"), MESH, Stage.RESHARDED, x=f"f32{before}")
    call = node(gm, "all_gather")
    call.target, call.args = target, (call.args[0], *args)
    call.meta["spec"] = parse(after, MESH)[1]
    return refused(gm)


@pytest.mark.parametrize(
    ("before", "after", "call"),
    [
        ("[8@dp, 4]", "[8, 4]", (c.all_gather, 1, "dp")),  # of another dim
        ("[8@dp, 4]", "[8, 4]", (c.all_gather, 0, "tp")),  # over another mesh dim
        ("[8@dp.tp, 4]", "[8@tp, 4]", (c.all_gather, 0, "dp")),  # pieces of pieces
        ("[8@dp, 4]+tp", "[8@dp, 4]", (c.all_reduce, "tp", "max")),  # another reduction
        ("[8@dp, 4]+max(tp)", "[8@dp, 4]", (c.all_reduce, "tp")),
        ("[8@dp, 4]+tp", "[8@dp, 4@tp]", (c.reduce_scatter, 0, "tp")),
        ("[8@dp, 4]+tp", "[8@dp, 4@tp]", (c.reduce_scatter, 1, "tp", "max")),
        ("[8@dp, 4]", "[8@dp, 4@tp]", (c.local_slice, 0, "tp")),
        ("[8@dp, 4]", "[8@tp.dp, 4]", (c.local_slice, 0, "tp")),
        ("[8@dp, 4]", "[8, 4@dp]", (c.all_to_all, 1, 0, "dp")),
        ("[8@dp, 4]+tp", "[8, 4]", (c.all_reduce, "tp")),  # does more than it says
    ],
)
def test_a_move_whose_arguments_say_something_else(before: str, after: str, call: tuple):
    assert broken(before, after, *call) == f"%all_gather cannot turn {before} into {after}"


# ---- started collectives


def started() -> GraphModule:
    gm = graph()
    call = node(gm, "all_reduce")
    with gm.graph.inserting_before(call):
        begun = gm.graph.create_node("call_function", c.start, (call.args[0], "all_reduce", "tp"), {}, "begun")
    begun.meta = dict(call.meta)
    call.target, call.args = c.wait, (begun,)
    return gm


def test_a_started_collective_is_held_to_the_same():
    verify(started(), Stage.SCHEDULED, MESH)
    gm = started()
    node(gm, "begun").meta["spec"] = parse("[8@dp, 6@tp]", MESH)[1]
    assert refused(gm, Stage.SCHEDULED) == "%begun cannot turn [8@dp, 6]+tp into [8@dp, 6@tp]"


def test_nothing_but_wait_takes_what_was_started():
    gm = started()
    node(gm, "relu").args = (node(gm, "begun"),)
    assert refused(gm, Stage.SCHEDULED) == "%begun is used before it is waited for"


def test_wait_takes_nothing_but_what_was_started():
    gm = started()
    node(gm, "all_reduce").args = (node(gm, "mm"),)
    assert refused(gm, Stage.SCHEDULED) == "%all_reduce waits for what was not started"
