"""Goldens of passes/seed_plan.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline
from torch.distributed.tensor.placement_types import Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import placeholders
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import spec
from shardc.compiler.ir.text import text
from shardc.compiler.plan.layout import Layout
from shardc.compiler.plan.wishes import Border
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.passes.layouts.seed_plan import SeedPlan
from tests.build import apply, build, context, on_one_device, param, random_inputs

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)
TYPES: dict[str, str] = dict(x="f32[8, 4]", w="f32[4, 6]", tangent="f32[8, 6]")


def layer(x, w, tangent):
    return aten.mm(x, w), aten.mm(aten.t(x), tangent)


def seeded(fn=layer, gradients=("w",), types=TYPES, layouts: dict | None = None, **options):
    """The seeded graph and what changed. layouts: of parameters, as keywords of `param`."""
    gm = build(fn, MESH, **types)
    for node in placeholders(gm):
        del node.meta["spec"]
    nodes = {n.name: n for n in placeholders(gm)}
    params = None if layouts is None else {name: param(nodes[name], MESH, **given) for name, given in layouts.items()}
    ctx = context(gm, MESH, gradients, params=params, **options)
    return gm, +Counter(apply(SeedPlan(), gm, ctx).changes)


def inputs(gm) -> dict[str, str]:
    return {n.name: str(spec(n)) for n in placeholders(gm)}


def calls(gm, target) -> list:
    return list(gm.graph.find_nodes(op="call_function", target=target))


SHARDED = {"stored": "[4@dp, 6]", "compute": "[4, 6]", "kept": "[4@dp, 6]", "unit": {"dp": ""}, "keys": {"dp": "dp"}}


def test_inputs_parameters_tangents_and_results_get_the_layouts_of_the_plan():
    gm, _ = seeded(layouts={"w": {"stored": "[4, 6@tp]"}}, data_axes=("dp",))
    assert_expected_inline(
        text(gm, MESH),
        """\
mesh dp=2 tp=2
%x: f32[8@dp, 4] = input
%w: f32[4, 6@tp] = input
%tangent: f32[8@dp, 6] = input
%mm: f32[8, 6] = aten.mm(%x, %w)
%t: f32[4, 8] = aten.t(%x)
%mm_1: f32[4, 6] = aten.mm(%t, %tangent)
%reshard: f32[8, 6] = shardc.reshard(%mm, [8@dp, 6])  # seed-plan
%mark_default: f32[4, 6] = shardc.mark(%mm_1, |gradient|w|)  # seed-plan
return (%reshard, %mark_default)""",
    )


def test_values_do_not_change():
    gm, _ = seeded(data_axes=("dp",), layouts={"w": SHARDED})
    given = random_inputs(gm)
    before = on_one_device(build(layer, MESH, **TYPES), given)
    for have, want in zip(on_one_device(gm, given), before, strict=True):
        assert torch.equal(have, want)


# ---- parameters


def test_a_parameter_computed_with_otherwise_than_stored_is_gathered_behind_it():
    gm, changes = seeded(layouts={"w": SHARDED}, data_axes=("dp",))
    (gather,) = (n for n in calls(gm, c.reshard) if n.args[0].name == "w")
    assert changes["gathers"] == 1 and str(gather.args[1]) == "[4, 6]"
    assert (gather.meta["why"], gather.meta["regather"]) == ("dp", True)
    assert inputs(gm)["w"] == "[4@dp, 6]"


def test_a_gather_that_is_kept_says_so():
    gm, _ = seeded(layouts={"w": SHARDED | {"kept": ""}}, data_axes=("dp",))
    (gather,) = (n for n in calls(gm, c.reshard) if n.args[0].name == "w")
    assert gather.meta["regather"] is False


def test_left_alone_a_parameter_that_nothing_uses():
    gm, changes = seeded(lambda x, w, tangent: x, (), layouts={"w": SHARDED})
    assert "gathers" not in changes and not placeholders(gm)[1].users


# ---- gradients


def wish_of(gm) -> str:
    (mark,) = calls(gm, MARK)
    ((_, wished, *_),) = mark.meta["wish"]
    return f"{wished.layout}, or pending over {wished.axes}" if wished.axes else str(wished.layout)


def test_a_gradient_is_wished_where_its_parameter_lies():
    gm, _ = seeded(layouts={"w": {"stored": "[4, 6@tp]"}}, data_axes=("dp",))
    assert wish_of(gm) == "[4, 6@tp]"


def test_no_sync_leaves_data_parallel_mesh_dims_out():
    gm, _ = seeded(data_axes=("dp",), keep=frozenset(["w"]))
    assert wish_of(gm) == "[4, 6], or pending over ('dp',)"


def test_no_sync_of_another_parameter_leaves_this_one_alone():
    gm, _ = seeded(data_axes=("dp",), keep=frozenset(["v"]))
    assert wish_of(gm) == "[4, 6]"


def test_the_gradient_of_an_ignored_parameter_stays_local():
    gm, _ = seeded(data_axes=("dp",), layouts={"w": {"local": frozenset({"dp"})}})
    assert wish_of(gm) == "[4, 6], or pending over ('dp',)"


def test_the_gradient_of_an_input_lies_as_the_input_does():
    def fn(x, w, tangent):
        return aten.mm(x, w), aten.mm(tangent, aten.t(w))

    gm, _ = seeded(fn, ("x",), layouts={"w": {}}, data_axes=("dp",))
    assert [str(n.args[1]) for n in calls(gm, c.reshard)] == ["[8@dp, 6]", "[8@dp, 4]"]
    assert not calls(gm, MARK)


# ---- inputs and outputs


def test_inputs_and_outputs_follow_what_compile_was_told():
    gm, _ = seeded(inputs=Layout(tp=Shard(1)), outputs=Layout(tp=Shard(0)))
    assert inputs(gm) == {"x": "[8, 4@tp]", "w": "[4, 6]", "tangent": "[8@tp, 6]"}


def test_scalars_are_never_split():
    def fn(x, s):
        return aten.mul(x, s)

    gm, _ = seeded(fn, (), {"x": "f32[8, 4]", "s": "f32[]"}, data_axes=("dp",))
    assert inputs(gm) == {"x": "[8@dp, 4]", "s": "[]"}


def test_an_input_layout_that_does_not_fit_is_refused_by_name():
    with pytest.raises(PlanError) as error:
        seeded(inputs=Layout(tp=Shard(2)))
    assert_expected_inline(
        str(error.value),
        """\
plan error: the input x is split on dim 2, but has 2 dims
   = help: name one of its dims""",
    )


# ---- marks


def marked(x, w, tangent):
    return aten.mm(MARK(x, "net|in|0"), w), aten.mm(aten.t(x), tangent)


def said(desired, axis: str = "tp", declared=None, open: bool = True) -> Border:
    return Border("in", 0, declared, desired, open, explicit=False, module="net", axis=axis, key='"net"')


def test_a_mark_gets_what_the_plan_says_of_it():
    gm, changes = seeded(marked, borders=(said(Shard(1)), said(Shard(0), "dp", open=False)))
    assert changes["marks"] == 1
    assert calls(gm, MARK)[0].meta["wish"] == (("tp", Shard(1), True, '"net"'), ("dp", Shard(0), False, '"net"'))


def test_left_alone_marks_that_no_entry_speaks_of():
    gm, changes = seeded(marked)
    assert "marks" not in changes and calls(gm, MARK)[0].meta["wish"] == ()


def test_left_alone_marks_of_which_an_entry_leaves_the_layout_open():
    gm, changes = seeded(marked, borders=(said(None, declared=Shard(0)),))
    assert "marks" not in changes


def test_left_alone_marks_of_gradients():
    def fn(x, w, tangent):
        return aten.mm(x, w), aten.mm(aten.t(x), MARK(tangent, "net|in|0|grad"))

    gm, changes = seeded(fn, borders=(said(Shard(1)),))
    assert "marks" not in changes and "wish" not in calls(gm, MARK)[0].meta


def test_constrain_fixes_every_mesh_dim():
    def fn(x, w, tangent):
        return aten.mm(MARK(x, f"constrain|{Layout(tp=Shard(1)).to_text()}"), w), aten.mm(aten.t(x), tangent)

    gm, _ = seeded(fn)
    wish = calls(gm, MARK)[0].meta["wish"]
    assert [(axis, str(p), opened) for axis, p, opened, _ in wish] == [("dp", "R", False), ("tp", "S(1)", False)]


def test_a_wish_that_does_not_fit_is_refused_with_its_place():
    with pytest.raises(PlanError) as error:
        seeded(marked, borders=(said(Shard(2)),))
    assert_expected_inline(
        str(error.value),
        """\
plan error: what enters net has shape (8, 4): Shard(2) does not fit a tensor of 2 dims
   | "net"
   = help: name a dim that the tensor has""",
    )


def test_carries_lie_as_they_were_kept():
    def fn(x, w, tangent, carry_w):
        return aten.mm(x, w), aten.add(aten.mm(aten.t(x), tangent), carry_w)

    kept = Spec.whole((4, 6)).with_pending({"dp": "sum"}, MESH)
    gm, _ = seeded(fn, types=TYPES | {"carry_w": "f32[4, 6]"}, data_axes=("dp",), carries={"w": kept})
    assert inputs(gm)["carry_w"] == "[4, 6]+dp"
