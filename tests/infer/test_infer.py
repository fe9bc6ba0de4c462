"""What an operator needs of its operands and gives, from how they arrive."""

from __future__ import annotations

import math

import pytest
import torch

from shardc.compiler.infer.infer import PENDING, decide, may_be_empty
from shardc.compiler.ir.node import specs
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.table import fit
from shardc.compiler.rules.table import parse as rule_line
from shardc.compiler.spec.mesh import Mesh
from tests.build import build, parse

MESH = Mesh(dp=2, tp=4)
aten = torch.ops.aten


def decision(line: str, *types: str, **options: object):
    """The decision of a rule given as a line, for float operands of these layouts."""
    layouts = [parse(t, MESH)[1] for t in types]
    made = rule_line(line, **options)  # pyright: ignore[reportArgumentType]
    shapes = [layout.shape for layout in layouts]
    sizes = dict(fit(made, shapes, []).sizes)
    results = [[math.prod(sizes[n] for n in dim) for dim in names] for names in made.results]
    rule = fit(made, shapes, results)
    return decide(rule, layouts, [4 * math.prod(s) for s in shapes], MESH)


def laid_out(line: str, *types: str, **options: object) -> str:
    """`wanted, wanted -> given`, as text."""
    found = decision(line, *types, **options)
    return f"{', '.join(map(str, found.operands))} -> {', '.join(map(str, found.results))}"


def call(fn, **types: str) -> str:
    """The same for the last call of a graph."""
    gm = build(fn, MESH, Stage.SHARDED, **types)
    node = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    return f"{', '.join(map(str, node.meta['wants']))} -> {', '.join(map(str, specs(node)))}"


MM = "m k, k n -> m n"


# ---- agreement: nothing moves


@pytest.mark.parametrize(
    ("x", "w", "result"),
    [
        ("[8, 16]", "[16, 32]", "[8, 32]"),
        ("[8@dp, 16]", "[16, 32]", "[8@dp, 32]"),
        ("[8, 16]", "[16, 32@tp]", "[8, 32@tp]"),
        ("[8@dp, 16]", "[16, 32@tp]", "[8@dp, 32@tp]"),
        ("[8, 16@tp]", "[16@tp, 32]", "[8, 32]+tp"),
        ("[8@dp, 16@tp]", "[16@tp, 32]", "[8@dp, 32]+tp"),
        ("[8, 16@dp.tp]", "[16@dp.tp, 32]", "[8, 32]+dp+tp"),
        ("[8, (3@tp 5)]", "[(3@tp 5), 32]", "[8, 32]+tp"),
        ("[8, 16]+tp", "[16, 8]", "[8, 8]+tp"),
    ],
)
def test_operands_that_agree_stay_as_they_are(x: str, w: str, result: str):
    assert laid_out(MM, x, w, sum="k", linear="0 | 1") == f"{x}, {w} -> {result}"


def test_a_split_is_extended_to_an_operand_that_is_whole():
    assert laid_out("m n, m n -> m n", "[8@dp, 4]", "[8, 4]") == "[8@dp, 4], [8@dp, 4] -> [8@dp, 4]"


def test_nothing_is_split_that_no_operand_splits():
    assert laid_out(MM, "[8, 16]", "[16, 32]", sum="k") == "[8, 16], [16, 32] -> [8, 32]"


def test_two_mesh_dims_on_one_factor_nest():
    assert laid_out("m, m -> m", "[16@dp]", "[16@tp]") == "[16@dp.tp], [16@dp.tp] -> [16@dp.tp]"


def test_the_nesting_of_the_operand_with_more_mesh_dims_wins():
    assert laid_out("m, m -> m", "[16@dp]", "[16@tp.dp]") == "[16@tp.dp], [16@tp.dp] -> [16@tp.dp]"


def test_a_contracted_maximum_is_pending_as_a_maximum():
    assert laid_out("m n -> m", "[8, 16@tp]", max="n") == "[8, 16@tp] -> [8]+max(tp)"


def test_a_factor_that_localize_joins_leaves_nothing_pending():
    assert laid_out("m n -> m", "[8, 16@tp]", joined="n") == "[8, 16@tp] -> [8]"


# ---- conflict: the fewest bytes move


def test_of_two_splits_of_one_size_the_first_operands_wins():
    assert laid_out("m n, m n -> m n", "[8@tp, 8]", "[8, 8@tp]") == "[8@tp, 8], [8@tp, 8] -> [8@tp, 8]"


def test_the_larger_operand_keeps_its_split():
    line = "m n, n -> m n"
    assert laid_out(line, "[32, 8@tp]", "[8]") == "[32, 8@tp], [8@tp] -> [32, 8@tp]"
    line = "m, m n -> m n"
    assert laid_out(line, "[8@tp]", "[8, 64@tp]") == "[8], [8, 64@tp] -> [8, 64@tp]"


def test_a_small_weight_is_gathered_rather_than_a_sum_left_pending():
    assert laid_out(MM, "[64@tp, 8]", "[8@tp, 8]", sum="k") == "[64@tp, 8], [8, 8] -> [64@tp, 8]"


def test_different_factors_of_one_dim_are_brought_to_one():
    found = laid_out("m, m -> m", "[12@tp]", "[(3@tp 4)]")
    assert found == "[12@tp], [12@tp] -> [12@tp]"


# ---- pending sums


def test_a_pending_sum_passes_a_linear_operator():
    assert call(lambda x: aten.neg(x), x="f32[8]+tp") == "[8]+tp -> [8]+tp"


def test_a_pending_sum_is_reduced_before_one_that_is_not():
    assert call(lambda x: aten.relu(x), x="f32[8]+tp") == "[8] -> [8]"


def test_a_product_passes_a_sum_through_one_operand_only():
    found = call(lambda x, y: aten.mul(x, y), x="f32[8]+tp", y="f32[8]")
    assert found == "[8]+tp, [8] -> [8]+tp"
    found = call(lambda x, y: aten.mul(x, y), x="f32[8]+tp", y="f32[8]+tp")
    assert found == "[8]+tp, [8] -> [8]+tp"


def test_a_sum_that_would_grow_is_reduced_first():
    assert laid_out(MM, "[8, 4]+tp", "[4, 32]", sum="k", linear="0 | 1") == "[8, 4], [4, 32] -> [8, 32]"


def test_two_pending_sums_add_to_one():
    found = call(lambda x, y: aten.add(x, y), x="f32[8]+tp", y="f32[8]+tp")
    assert found == "[8]+tp, [8]+tp -> [8]+tp"


def test_a_whole_operand_of_equal_size_is_not_counted_once_per_rank():
    found = call(lambda x, y: aten.add(x, y), x="f32[8]+tp", y="f32[8]")
    assert found == "[8], [8] -> [8]"


def test_a_small_bias_joins_a_pending_sum_on_one_rank():
    found = call(lambda x, b: aten.add(x, b), x="f32[64, 8]+tp", b="f32[8]")
    assert found == "[64, 8]+tp, [8]+tp -> [64, 8]+tp"


def test_a_pending_maximum_passes_nothing():
    assert call(lambda x: aten.neg(x), x="f32[8]+max(tp)") == "[8] -> [8]"


def test_a_gradient_passes_the_backward_of_a_function_that_its_input_does_not():
    def fn(g, x):
        return aten.threshold_backward(g, x, 0)

    assert call(fn, g="f32[8]+tp", x="f32[8]") == "[8]+tp, [8] -> [8]+tp"
    assert call(fn, g="f32[8]", x="f32[8]+tp") == "[8], [8] -> [8]"


def test_a_sum_meets_a_split_by_being_scattered():
    found = laid_out("m n, m n -> m n", "[8, 8]+tp", "[8, 8@tp]", linear="0 1")
    assert found == "[8, 8@tp], [8, 8@tp] -> [8, 8@tp]"


def test_pending_over_one_mesh_dim_and_split_over_another():
    assert call(lambda x: aten.neg(x), x="f32[8@dp]+tp") == "[8@dp]+tp -> [8@dp]+tp"
    assert call(lambda x: aten.relu(x), x="f32[8@dp]+tp") == "[8@dp] -> [8@dp]"


def test_the_choice_is_kept_per_mesh_dim():
    found = decision("m -> m", "[8@dp]+tp", linear="0")
    assert found.choices == (("dp", "m"), ("tp", PENDING))
    assert str(found.factor("m")) == str(parse("[8@dp]", MESH)[1].dims[0])


# ---- factors that must not be split, or not so


def test_a_whole_factor_is_gathered():
    assert laid_out("m n -> m n", "[8@dp, 16@tp]", whole="n") == "[8@dp, 16] -> [8@dp, 16]"


def test_a_plain_factor_takes_no_compound_split():
    assert laid_out("m -> m", "[12@tp]", plain="m") == "[12@tp] -> [12@tp]"
    assert laid_out("m -> m", "[(3@tp 4)]", plain="m") == "[12] -> [12]"


def test_a_nonempty_factor_takes_no_split_that_leaves_a_rank_without():
    assert laid_out("m -> m", "[5@dp]", nonempty="m") == "[5@dp] -> [5@dp]"
    assert laid_out("m -> m", "[5@tp]", nonempty="m") == "[5] -> [5]"  # 2, 2, 1, 0


def test_nesting_does_not_empty_a_nonempty_factor():
    found = laid_out("m, m -> m", "[5@dp]", "[5@tp]", nonempty="m")
    assert found == "[5@dp], [5@dp] -> [5@dp]"


@pytest.mark.parametrize(
    ("text", "empty"),
    [("8@tp", False), ("5@tp", True), ("(3 5@dp)", False), ("(3@tp 5)", True), ("0", True), ("6@dp.tp", True)],
)
def test_may_be_empty(text: str, empty: bool):
    assert may_be_empty(parse(f"[{text}]", MESH)[1].dims[0], MESH) is empty


# ---- views


@pytest.mark.parametrize(
    ("x", "shape", "expected"),
    [
        ("[8, 16@tp]", [8, 4, 4], "[8, 16@tp] -> [8, 4@tp, 4]"),
        ("[8, 16@dp.tp]", [8, 2, 8], "[8, 16@dp.tp] -> [8, 2@dp, 8@tp]"),
        ("[8, (3@tp 4)]", [8, 3, 4], "[8, (3@tp 4)] -> [8, 3@tp, 4]"),
        ("[8, (3 4@tp)]", [8, 3, 4], "[8, (3 4@tp)] -> [8, 3, 4@tp]"),
        ("[8, 4@tp, 4]", [8, 16], "[8, 4@tp, 4] -> [8, 16@tp]"),
        ("[8, 3@tp, 4]", [8, 12], "[8, 3@tp, 4] -> [8, (3@tp 4)]"),
        ("[8, 3, 4@tp]", [8, 12], "[8, 3, 4@tp] -> [8, (3 4@tp)]"),
        ("[8@dp, 4@tp]", [32], "[8@dp, 4@tp] -> [(8@dp 4@tp)]"),
        ("[8@dp]+tp", [2, 4], "[8@dp]+tp -> [2@dp, 4]+tp"),
    ],
)
def test_a_view_carries_splits_that_lie_between_its_factors(x: str, shape: list[int], expected: str):
    assert call(lambda x: aten.view(x, shape), x=f"f32{x}") == expected


@pytest.mark.parametrize(
    ("x", "shape", "expected"),
    [
        ("[8, 12@tp]", [8, 2, 6], "[8, 12] -> [8, 2, 6]"),  # four pieces of a pair of sixes
        ("[8, (3@dp 4)]", [8, 4, 3], "[8, 12] -> [8, 4, 3]"),
    ],
)
def test_a_view_gathers_splits_that_cross_a_border(x: str, shape: list[int], expected: str):
    assert call(lambda x: aten.view(x, shape), x=f"f32{x}") == expected


def test_a_view_keeps_the_mesh_dim_that_fits_when_another_does_not():
    found = call(lambda x: aten.view(x, [10, 2]), x="f32[20@dp.tp]")  # 3, 3, 3, 1 of ten are no pairs
    assert found == "[20@dp] -> [10@dp, 2]"


# ---- operators without a rule


def test_an_operator_without_a_rule_gets_whole_operands():
    found = call(lambda x: aten.frobenius_norm.dim(x, [1]), x="f32[8@dp, 16]+tp")
    assert found == "[8, 16] -> [8]"
