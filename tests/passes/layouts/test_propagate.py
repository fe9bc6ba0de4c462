"""Goldens of passes/propagate.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline
from torch.distributed.tensor.placement_types import Replicate, Shard

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import spec, specs
from shardc.compiler.ir.text import text
from shardc.compiler.rules.table import overload
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.layouts.propagate import Propagate
from tests.build import apply, build, context, reshard

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)


def laid_out(fn, strict: bool = False, wishes: dict[str, tuple] | None = None, **types: str):
    gm = build(fn, MESH, **types)
    for node in gm.graph.find_nodes(op="call_function", target=MARK):
        node.meta["wish"] = (wishes or {}).get(node.args[1], ())
    return gm, apply(Propagate(), gm, context(gm, MESH, strict=strict))


def layouts(gm) -> dict[str, str]:
    return {n.name: ", ".join(map(str, specs(n))) for n in gm.graph.nodes if n.op == "call_function"}


def test_seeds_flow_through_rules():
    def mlp(x, w1, w2):
        return aten.mm(aten.relu(aten.mm(x, w1)), w2)

    gm, _ = laid_out(mlp, x="f32[8@dp, 16]", w1="f32[16, 32@tp]", w2="f32[32@tp, 16]")
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8@dp, 16] = input
%w1: f32[16, 32@tp] = input
%w2: f32[32@tp, 16] = input
%mm: f32[8@dp, 32@tp] = aten.mm(%x, %w1)
%relu: f32[8@dp, 32@tp] = aten.relu(%mm)
%mm_1: f32[8@dp, 16]+tp = aten.mm(%relu, %w2)
return (%mm_1)""",
    )


def test_a_node_says_what_it_needs_where_operands_disagree():
    gm, _ = laid_out(lambda x, y: aten.mul(x, y), x="f32[8@tp, 4]", y="f32[8, 4@tp]")
    (mul,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert [str(w) for w in mul.meta["wants"]] == ["[8@tp, 4]", "[8@tp, 4]"]


def test_an_item_of_several_results_has_its_own_layout():
    def fn(x):
        a, b = aten.split_with_sizes(x, [3, 5], 1)[0], aten.split_with_sizes(x, [3, 5], 1)[1]
        return a, b

    gm, _ = laid_out(fn, x="f32[8@dp, 8]")
    assert layouts(gm)["getitem"] == "[8@dp, 3]" and layouts(gm)["getitem_1"] == "[8@dp, 5]"


def test_a_reshard_gives_the_layout_it_names():
    gm, _ = laid_out(lambda x: aten.relu(reshard(x, "[8, 4@tp]")), x="f32[8@dp, 4]")
    assert layouts(gm) == {"reshard": "[8, 4@tp]", "relu": "[8, 4@tp]"}


def test_nothing_is_split_where_nothing_was():
    gm, record = laid_out(lambda x: aten.relu(x), x="f32[8, 4]")
    assert (layouts(gm), +Counter(record.changes)) == ({"relu": "[8, 4]"}, {})


# ---- pending sums


def test_a_pending_sum_travels_while_what_is_made_of_it_is_no_larger():
    gm, _ = laid_out(lambda x: aten.relu(aten.neg(x)), x="f32[8, 4]+tp")
    assert layouts(gm) == {"neg": "[8, 4]+tp", "relu": "[8, 4]"}


def test_a_pending_sum_with_two_uses_is_summed_once_for_both():
    def fn(x):
        return aten.neg(x), aten.mul(x, 2)

    gm, _ = laid_out(fn, x="f32[8, 4]+tp")
    assert layouts(gm) == {"neg": "[8, 4]", "mul": "[8, 4]"}


# ---- operators without a rule


def unruled(x):
    return aten.frobenius_norm.dim(aten.frobenius_norm.dim(x, [1], True), [1])


def test_an_operator_without_a_rule_runs_whole_and_is_reported():
    gm, record = laid_out(unruled, x="f32[8@dp, 4]")
    assert set(layouts(gm).values()) == {"[8, 1]", "[8]"}
    assert record.notes == ("aten.frobenius_norm.dim has no rule: 1 calls run on whole operands",)


def test_an_operator_without_a_rule_is_not_reported_where_its_operands_are_whole_anyway():
    _, record = laid_out(unruled, x="f32[8, 4]")
    assert record.notes == ()


def test_strict_refuses_an_operator_without_a_rule():
    gm = build(unruled, MESH, x="f32[8@dp, 4]")
    with pytest.raises(ShardingError) as error:
        apply(Propagate(), gm, context(gm, MESH, strict=True))
    assert_expected_inline(
        str(error.value),
        """\
sharding error: aten.frobenius_norm.dim has no sharding rule, and strict=True allows none without
   | > %frobenius_norm: f32[8, 1] = aten.frobenius_norm.dim(%x, [1], True)
   = help: say what its dims mean: shardc.rule(torch.ops.aten.frobenius_norm.dim, "... -> ...")""",
    )


def test_the_line_that_strict_prints_names_the_operator_as_rules_do():
    assert overload("aten::frobenius_norm.dim") is aten.frobenius_norm.dim
    assert overload("aten::mm.default") is overload("aten::mm") is aten.mm.default


def test_strict_allows_it_on_whole_operands():
    laid_out(unruled, strict=True, x="f32[8, 4]")


# ---- marks


def border(x):
    return aten.relu(MARK(x, "net|in|0"))


SEQUENCE = {"net|in|0": (("tp", Shard(1), False, "the plan"),)}


def test_a_mark_takes_the_layout_wished_for():
    gm, _ = laid_out(border, wishes=SEQUENCE, x="f32[8@dp, 4]")
    assert layouts(gm) == {"mark": "[8@dp, 4@tp]", "relu": "[8@dp, 4@tp]"}


def test_left_alone_a_mark_of_which_nothing_is_said():
    gm, _ = laid_out(border, x="f32[8@dp, 4]")
    assert layouts(gm)["mark"] == "[8@dp, 4]"


def test_a_mark_leaves_other_mesh_dims_as_they_are():
    gm, _ = laid_out(border, wishes={"net|in|0": (("dp", Replicate(), False, ""),)}, x="f32[8@dp, 4]+tp")
    assert layouts(gm)["mark"] == "[8, 4]+tp"


def test_an_open_wish_takes_any_split_of_its_dim():
    wish = {"net|in|0": (("tp", Shard(1), True, ""),)}
    gm, _ = laid_out(border, wishes=wish, x="f32[8@dp, (3@tp 4)]")
    assert layouts(gm)["mark"] == "[8@dp, (3@tp 4)]"


def there_and_back(x, tangent):
    return aten.relu(MARK(x, "net|in|0")), MARK(tangent, "net|in|0|grad")


def left_and_back(x, tangent):
    return aten.relu(MARK(x, "net|out|0")), MARK(tangent, "net|out|0|grad")


@pytest.mark.parametrize(
    ("x", "wish", "tangent", "gradient"),
    [
        ("[8, 4@tp]", Replicate(), "[8, 4]+tp", "[8, 4]+tp"),  # stays pending: its siblings may join it
        ("[8, 4@tp]", Replicate(), "[8, 4]", "[8, 4@tp]"),
        ("[8, 4]", Shard(1), "[8, 4@tp]", "[8, 4]"),
        ("[8, 4]+tp", Replicate(), "[8, 4]", "[8, 4]"),
        ("[8, 4@tp]", Shard(1), "[8, 4]", "[8, 4]"),  # nothing changed there, so nothing does here
    ],
)
def test_the_gradient_of_what_enters_goes_back_to_how_that_lay(x: str, wish, tangent: str, gradient: str):
    wishes = {"net|in|0": (("tp", wish, False, ""),)}
    gm, _ = laid_out(there_and_back, wishes=wishes, x=f"f32{x}", tangent=f"f32{tangent}")
    assert layouts(gm)["mark_1"] == gradient


def test_the_gradient_of_what_leaves_is_not_left_pending():
    wishes = {"net|out|0": (("tp", Shard(0), False, ""),)}
    gm, _ = laid_out(left_and_back, wishes=wishes, x="f32[8, 4@tp]", tangent="f32[8, 4]+tp")
    assert layouts(gm)["mark_1"] == "[8, 4@tp]"


def test_calls_of_one_module_meet_their_gradients_last_first():
    def twice(x, y, tangent):
        forward = MARK(x, "net|in|0"), MARK(y, "net|in|0")
        return (*forward, MARK(tangent, "net|in|0|grad"), MARK(tangent, "net|in|0|grad"))

    wishes = {"net|in|0": (("tp", Replicate(), False, ""),)}
    gm, _ = laid_out(twice, wishes=wishes, x="f32[8, 4@tp]", y="f32[8@tp, 4]", tangent="f32[8, 4]")
    assert (layouts(gm)["mark_2"], layouts(gm)["mark_3"]) == ("[8@tp, 4]", "[8, 4@tp]")


def test_a_gradient_whose_forward_mark_is_gone_stays_as_it_is():
    gm, _ = laid_out(lambda tangent: MARK(tangent, "net|in|0|grad"), tangent="f32[8, 4@tp]")
    assert str(spec(returned(gm)[0])) == "[8, 4@tp]"
