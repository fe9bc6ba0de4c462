"""Goldens of passes/join_messages.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.join_messages import JoinMessages
from shardc.passes.local.localize import Localize
from tests.build import (
    all_gather,
    all_reduce,
    apply,
    build,
    context,
    local,
    on_one_device,
    random_inputs,
    reduce_scatter,
    simulated,
)

aten = torch.ops.aten
DP = Mesh(dp=2)
WEIGHTS = dict(x="f32[4@dp, 5]", w="f32[5@dp, 6]", b="f32[6@dp]")


def joined(fn: Any, units: dict[str, str], mesh: Mesh = DP, /, plan: Any = None, **types: str) -> GraphModule:
    """The graph after the pass; units: which unit each collective serves, by its name. It computes what it did."""
    gm = local(fn, mesh, **types)
    ctx = context(gm, mesh, **plan or {})
    for node in call_nodes(gm):
        if node.name in units:
            node.meta["unit"] = units[node.name]
    inputs = random_inputs(gm)
    before = on_one_device(gm, inputs)
    apply(JoinMessages(), gm, ctx)
    for have, want in zip(simulated(gm, mesh, inputs), before, strict=True):
        assert torch.equal(have, want)
    return gm


def shown(gm: GraphModule, mesh: Mesh = DP) -> str:
    return "\n".join(line for line in text(gm, mesh).splitlines() if " = input" not in line)


def linear(x, w, b):
    return aten.add(aten.mm(x, all_gather(w, 0, "dp")), all_gather(b, 0, "dp"))


def gradients(x, tangent):
    w = reduce_scatter(aten.mm(aten.t(x), tangent), 0, "dp")
    return aten.div(w, 2), reduce_scatter(aten.sum(tangent, [0]), 0, "dp")


GIVEN = dict(x="f32[4@dp, 5]", tangent="f32[4@dp, 6]")
BOTH = {"all_gather": "layer", "all_gather_1": "layer"}
SCATTERS = {"reduce_scatter": "layer", "reduce_scatter_1": "layer"}


def test_gathers_of_a_unit_become_one_where_the_first_was():
    assert_expected_inline(
        shown(joined(linear, BOTH, **WEIGHTS)),
        """\
mesh dp=2
%all_gather_2: (f32[5, 6], f32[6]) = shardc.all_gather([%w, %b], [0, 0], dp)  # join-messages
%getitem: f32[5, 6] = getitem(%all_gather_2, 0)  # join-messages
%getitem_1: f32[6] = getitem(%all_gather_2, 1)  # join-messages
%mm: f32[4@dp, 6] = aten.mm(%x, %getitem)
%add: f32[4@dp, 6] = aten.add.Tensor(%mm, %getitem_1)
return (%add)""",
    )


def test_reductions_of_a_unit_become_one_where_the_last_was():
    assert_expected_inline(
        shown(joined(gradients, SCATTERS, **GIVEN)),
        """\
mesh dp=2
%t: f32[5, 4@dp] = aten.t(%x)
%mm: f32[5, 6]+dp = aten.mm(%t, %tangent)
%sum_1: f32[6]+dp = aten.sum.dim_IntList(%tangent, [0])
%reduce_scatter_2: (f32[5@dp, 6], f32[6@dp]) = shardc.reduce_scatter([%mm, %sum_1], [0, 0], dp)  # join-messages
%getitem: f32[5@dp, 6] = getitem(%reduce_scatter_2, 0)  # join-messages
%getitem_1: f32[6@dp] = getitem(%reduce_scatter_2, 1)  # join-messages
%div: f32[5@dp, 6] = aten.div.Tensor(%getitem, 2)
return (%div, %getitem_1)""",
    )


def test_gradients_travel_in_the_dtype_of_the_plan():
    plan = {"reduce_dtype": {"dp": torch.bfloat16}, "data_axes": ("dp",)}
    assert_expected_inline(
        shown(joined(gradients, SCATTERS, plan=plan, **GIVEN))
        .replace("  # join-messages", "")
        .replace("_to_copy_default", "cast"),
        """\
mesh dp=2
%t: f32[5, 4@dp] = aten.t(%x)
%mm: f32[5, 6]+dp = aten.mm(%t, %tangent)
%sum_1: f32[6]+dp = aten.sum.dim_IntList(%tangent, [0])
%cast: bf16[5, 6]+dp = aten._to_copy(%mm, dtype=bf16)
%cast_1: bf16[6]+dp = aten._to_copy(%sum_1, dtype=bf16)
%reduce_scatter_2: (bf16[5@dp, 6], bf16[6@dp]) = shardc.reduce_scatter([%cast, %cast_1], [0, 0], dp)
%getitem: bf16[5@dp, 6] = getitem(%reduce_scatter_2, 0)
%cast_2: f32[5@dp, 6] = aten._to_copy(%getitem, dtype=f32)
%getitem_1: bf16[6@dp] = getitem(%reduce_scatter_2, 1)
%cast_3: f32[6@dp] = aten._to_copy(%getitem_1, dtype=f32)
%div: f32[5@dp, 6] = aten.div.Tensor(%cast_2, 2)
return (%div, %cast_3)""",
    )


def untouched(fn: Any, units: dict[str, str], mesh: Mesh = DP, /, **types: str) -> bool:
    return "join-messages" not in shown(joined(fn, units, mesh, **types), mesh)


def test_left_alone_where_no_unit_is_served():
    assert untouched(linear, {}, **WEIGHTS)
    assert untouched(linear, {"all_gather": "layer"}, **WEIGHTS)


def test_left_alone_in_different_units():
    assert untouched(linear, {"all_gather": "layer", "all_gather_1": ""}, **WEIGHTS)


def test_the_root_is_a_unit_too():
    assert not untouched(linear, {"all_gather": "", "all_gather_1": ""}, **WEIGHTS)


def test_left_alone_over_different_mesh_dims():
    def crossed(x, w, b):
        return aten.add(aten.mm(x, all_gather(w, 0, "dp")), all_gather(b, 0, "tp"))

    types = WEIGHTS | {"b": "f32[6@tp]"}
    assert untouched(crossed, BOTH, Mesh(dp=2, tp=2), **types)


def test_left_alone_in_different_dtypes():
    def mixed(x, w, b):
        return aten.add(aten.mm(x, all_gather(w, 0, "dp")), all_gather(b, 0, "dp"))

    assert untouched(mixed, BOTH, **WEIGHTS | {"b": "f64[6@dp]"})


def test_left_alone_where_one_is_for_forward_and_one_for_backward():
    def both(x, w, tangent):
        y = aten.mm(x, all_gather(w, 0, "dp"))
        return y, aten.mm(tangent, aten.t(all_gather(w, 0, "dp")))

    gm = build(both, DP, Stage.RESHARDED, x="f32[4@dp, 5]", w="f32[5@dp, 6]", tangent="f32[4@dp, 6]")
    late = call_nodes(gm)[-3]
    assert late.name == "all_gather_1"
    for node in call_nodes(gm):
        node.meta["unit"] = "layer" if "gather" in node.name else None
    late.meta["phase"] = "backward"
    apply(Localize(), gm, context(gm, DP))
    apply(JoinMessages(), gm, context(gm, DP))
    assert "join-messages" not in text(gm, DP)


def test_left_alone_where_what_is_gathered_is_computed():
    def computed(x, w, b):
        return aten.add(aten.mm(x, all_gather(w, 0, "dp")), all_gather(aten.relu(b), 0, "dp"))

    assert untouched(computed, BOTH, **WEIGHTS)


def test_left_alone_where_one_gradient_is_made_from_the_other():
    def chained(x, tangent):
        first = reduce_scatter(aten.sum(tangent, [0]), 0, "dp")
        whole = all_gather(first, 0, "dp")
        return first, reduce_scatter(aten.sum(aten.mul(tangent, whole), [0]), 0, "dp")

    assert untouched(chained, SCATTERS, **GIVEN)


def test_left_alone_on_one_rank():
    assert untouched(linear, BOTH, Mesh(dp=1), **WEIGHTS)


def test_other_collectives_stay_as_they_are():
    def reduced(x, tangent):
        return all_reduce(aten.sum(tangent, [0]), "dp"), all_reduce(aten.sum(x, [0]), "dp")

    assert untouched(reduced, {"all_reduce": "layer", "all_reduce_1": "layer"}, **GIVEN)


def test_uneven_shards_of_several_dims_on_four_ranks():
    def wide(x, w, b):
        return aten.add(aten.mm(x, all_gather(w, 1, "dp")), all_gather(b, 0, "dp"))

    gm = joined(wide, BOTH, Mesh(dp=4), x="f32[4@dp, 5]", w="f32[5, 6@dp]", b="f32[6@dp]")
    assert "all_gather([%w, %b], [1, 0], dp)" in text(gm, Mesh(dp=4))
