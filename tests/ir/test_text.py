"""A graph as text. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import arg_text, excerpt, node_text, text, type_text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.rank_numbers import Local
from shardc.compiler.spec.spec import Part
from tests.build import build, reduce_scatter, reshard

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=4)


def layer(x, w):
    return reduce_scatter(aten.mm(x, w), 1, "tp")


def graph(stage: Stage = Stage.RESHARDED):
    return build(layer, MESH, stage, x="f32[8@dp, 32@tp]", w="f32[32@tp, 16]")


def node(gm, name: str):
    return next(n for n in gm.graph.nodes if n.name == name)


def test_a_program_is_its_mesh_and_one_line_per_value():
    gm = graph()
    node(gm, "reduce_scatter").meta["made_by"] = "lower-reshards"
    assert_expected_inline(
        text(gm, MESH, {"w": "param layers.0.w"}),
        """\
mesh dp=2 tp=4
%x: f32[8@dp, 32@tp] = input
%w: f32[32@tp, 16] = param layers.0.w
%mm: f32[8@dp, 16]+tp = aten.mm(%x, %w)
%reduce_scatter: f32[8@dp, 16@tp] = shardc.reduce_scatter(%mm, 1, tp)  # lower-reshards
return (%reduce_scatter)""",
    )


def test_before_propagation_types_are_shapes():
    assert node_text(node(graph(Stage.TRACED), "mm")) == "%mm: f32[8, 16] = aten.mm(%x, %w)"


def test_several_results_stand_in_parentheses():
    gm = build(lambda x: aten.topk(x, 2)[1], MESH, x="bf16[8, 4]")
    assert [node_text(n) for n in gm.graph.nodes if n.op == "call_function"] == [
        "%topk: (bf16[8, 2], i64[8, 2]) = aten.topk(%x, 2)",
        "%getitem: i64[8, 2] = getitem(%topk, 1)",
    ]


def test_a_single_result_in_a_list_keeps_its_parentheses():
    gm = build(lambda x: aten.split.Tensor(x, 8)[0], MESH, x="f32[8]")
    assert node_text(next(n for n in gm.graph.nodes if n.op == "call_function")).startswith("%split: (f32[8]) =")


def test_overloads_keywords_lists_and_dtypes():
    gm = build(lambda x: aten._to_copy(aten.sum(x, [0, 1], True), dtype=torch.float16), MESH, x="f32[8, 4]")
    assert [node_text(n).partition(" = ")[2] for n in gm.graph.nodes if n.op == "call_function"] == [
        "aten.sum.dim_IntList(%x, [0, 1], True)",
        "aten._to_copy(%sum_1, dtype=f16)",
    ]


@pytest.mark.parametrize(
    ("arg", "shown"),
    [
        (3, "3"),
        (None, "None"),
        ("tp", "tp"),
        (torch.bfloat16, "bf16"),
        (torch.float8_e5m2, "torch.float8_e5m2"),
        ([1, (2, [3])], "[1, (2, [3])]"),
        (Local((Part(10, ("tp",)),)), "10@tp"),
        (Local((Part(3, ("tp",)), Part(4))), "(3@tp 4)"),
        (Local((Part(10, ("tp",)),)) * 2 + 1, "2*10@tp+1"),
        (-Local((Part(10, ("tp",)),), "start"), "-start(10@tp)"),
        ((Local((Part(10, ("tp",)),), "start") - 1) % 3, "(start(10@tp)-1)%3"),
        ([Local((Part(10, ("tp",)),)), 4], "[10@tp, 4]"),
    ],
)
def test_arguments(arg: object, shown: str):
    assert arg_text(arg) == shown


def test_a_reshard_shows_its_target():
    gm = build(lambda x: reshard(x, "[8, 4@tp]+dp"), MESH, Stage.RESHARDED, x="f32[8@dp, 4]")
    assert node_text(node(gm, "reshard")) == "%reshard: f32[8, 4@tp]+dp = shardc.reshard(%x, [8, 4@tp]+dp)"


def test_steps_of_local_forms_show_what_rank_0_holds():
    gm = graph()
    call = node(gm, "mm")
    call.meta = {"local": torch.empty(4, 16, device="meta")}
    assert type_text(call) == "f32[4, 16]"
    call.meta = {"local": [torch.empty(4, device="meta"), torch.empty(2, device="meta")]}
    assert type_text(call) == "(f32[4], f32[2])"


def test_a_layout_that_is_missing_shows():
    gm = build(lambda x: aten.topk(x, 2)[1], MESH, Stage.SHARDED, x="f32[8, 4]")
    call = node(gm, "topk")
    call.meta["spec"] = call.meta["spec"][:1]
    assert type_text(call) == "?"


def test_an_excerpt_points_at_a_line():
    gm = graph()
    assert excerpt(node(gm, "reduce_scatter")) == "\n".join([
        f"  {node_text(node(gm, 'mm'))}", f"> {node_text(node(gm, 'reduce_scatter'))}",
    ])  # fmt: skip
    assert excerpt(node(gm, "mm")) == f"> {node_text(node(gm, 'mm'))}"
    assert excerpt(node(gm, "x")) == "> %x: f32[8@dp, 32@tp] = input"
