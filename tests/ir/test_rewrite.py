"""What a call made by a pass says of itself: what it inherits, what is computed, and what is stale."""

import pytest
import torch
from torch.fx import Node

from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes, placeholders
from shardc.compiler.ir.node import INHERITED, View, of, spec, tensors, val
from shardc.compiler.ir.rewrite import become, cast, emit, redirect, replace, retarget
from shardc.compiler.pipeline.runner import Context, PassResult, Runner
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from tests.build import build, context

aten = torch.ops.aten
MESH = Mesh(dp=2)


def two_calls(x, y):
    return aten.mul.Tensor(aten.add.Tensor(x, y), y)


def graph(stage: Stage = Stage.SHARDED):
    gm = build(two_calls, MESH, stage, x="f32[8@dp, 4]", y="f32[8@dp, 4]")
    for node in call_nodes(gm):
        for name in INHERITED:
            setattr(of(node), name, f"its {name}")
        of(node).why, of(node).origin, of(node).made_by = "the plan", "elsewhere", "another-pass"
    return gm


def made(target, args, like: Node, *rest, **options) -> Node:
    with like.graph.inserting_before(like.graph.output_node()):
        return emit(target, args, like, *rest, **options)


def test_a_new_call_inherits_where_it_comes_from_and_no_more():
    add, _ = call_nodes(graph())
    new = made(aten.neg.default, (add,), add)
    assert {name: getattr(of(new), name) for name in INHERITED} == {name: f"its {name}" for name in INHERITED}
    assert not {"spec", "wants", "rule", "why", "origin", "made_by"} & new.meta.keys()


def test_what_is_said_of_a_new_call_goes_before_what_it_inherits():
    add, _ = call_nodes(graph())
    assert of(made(aten.neg.default, (add,), add, phase="backward")).phase == "backward"


def test_nothing_is_said_that_a_view_does_not_list():
    add, _ = call_nodes(graph())
    with pytest.raises(AttributeError):
        made(aten.neg.default, (add,), add, fase="backward")


@pytest.mark.parametrize(
    "target, rest, kwargs, shape, dtype",
    [
        (aten.sum.dim_IntList, ([0],), {}, (4,), torch.float32),
        (aten._to_copy.default, (), {"dtype": torch.float64}, (8, 4), torch.float64),
        (aten.slice.Tensor, (0, 0, 3), {}, (3, 4), torch.float32),
        (reshard, (Spec.whole((8, 4)),), {}, (8, 4), torch.float32),
    ],
)
def test_the_value_is_what_the_operator_gives_on_its_operands_values(target, rest, kwargs, shape, dtype):
    add, mul = call_nodes(graph())
    new = made(target, (add, *rest), mul, kwargs)
    assert (val(new).shape, val(new).dtype) == (shape, dtype)


def test_a_collective_moves_its_operand_whose_value_it_has():
    add, _ = call_nodes(graph())
    assert val(made(reshard, (add, Spec.whole((8, 4))), add)) is val(add)


def test_a_node_becomes_what_another_was_but_for_its_call():
    add, mul = call_nodes(graph(Stage.RESHARDED))
    new = become(made(aten.neg.default, (add,), mul), add, origin=add.name)
    assert (spec(new), of(new).why, of(new).origin) == (spec(add), "the plan", "add")
    assert of(add).wants and not {"rule", "wants", "made_by"} & new.meta.keys()


def test_a_replaced_node_is_gone_and_a_redirected_one_is_used_by_others_still():
    gm = graph()
    (add, mul), (x, y) = call_nodes(gm), placeholders(gm)
    redirect([mul], y, x)
    assert (mul.args, add.args) == ((add, x), (x, y))
    replace(add, x)
    assert call_nodes(gm) == [mul] and mul.args == (x, x)


def test_another_call_in_a_node_keeps_its_value_and_name_but_not_its_rule():
    add, _ = call_nodes(graph(Stage.RESHARDED))
    value, name = val(add), add.name
    retarget(add, aten.sub.Tensor, add.args)
    assert (val(add), add.name, add.target) == (value, name, aten.sub.Tensor)
    assert "rule" not in of(add) and "wants" not in of(add)


def test_the_runner_says_who_made_a_node_and_who_made_it_another_call():
    class Edits:
        name, takes, gives, exact = "edits", Stage.TRACED, Stage.TRACED, False

        def run(self, gm, ctx: Context) -> PassResult:
            add, mul = call_nodes(gm)
            with gm.graph.inserting_before(mul):
                replace_input = emit(aten.neg.default, (add,), add)
            mul.replace_input_with(add, replace_input)
            retarget(add, aten.sub.Tensor, add.args)
            return PassResult()

    gm = build(two_calls, MESH, Stage.TRACED, x="f32[8, 4]", y="f32[8, 4]")
    Runner(gm, context(gm, MESH), {}).run(Edits())
    assert [of(n).made_by for n in call_nodes(gm)] == ["edits", "edits", ""]


def test_a_cast_back_to_what_a_value_was_cast_from_is_that_value():
    add, mul = call_nodes(graph())
    with mul.graph.inserting_before(mul):
        wide = cast(add, torch.float64)
        assert tensors(wide)[0].dtype is torch.float64 and of(wide).wire is torch.float32
        assert cast(wide, torch.float32) is add
        narrow = cast(add, torch.bfloat16)
        assert cast(narrow, torch.float32) is not add  # what was rounded stays so


def test_a_view_reads_defaults_where_nothing_was_said():
    (x, _) = placeholders(graph())
    x.meta.clear()
    assert (of(x).where, of(x).phase, of(x).region, of(x).unit, of(x).data) == ("", "forward", "", None, False)
    assert isinstance(of(x), View) and "where" not in of(x)
