"""Goldens of passes/choose_factors.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.graph import placeholders
from shardc.compiler.ir.node import spec
from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.layouts.choose_factors import ChooseFactors
from tests.build import apply, build, context, on_one_device, param, random_inputs, reshard

aten = torch.ops.aten
TWO, FOUR = Mesh(tp=2), Mesh(tp=4)
COLUMNS = "[6, 48@tp]"


def heads(x, w):
    return aten.view(aten.mm(x, w), [8, 3, 16])


def chosen(fn, mesh: Mesh, w: str, open: tuple[str, ...] = ("tp",), compute: str = ""):
    gm = build(fn, mesh, x="f32[8, 6]", w=w)
    node = placeholders(gm)[1]
    layout = param(node, mesh, "" if compute else w, compute, open=open)
    record = apply(ChooseFactors(), gm, context(gm, mesh, ("w",), params={"w": layout}))
    return gm, +Counter(record.changes)


def test_heads_stay_whole():
    gm, changes = chosen(heads, TWO, "f32[6, 48@tp]")
    assert changes == {"refined": 1}
    assert_expected_inline(
        text(gm, TWO),
        """\
mesh tp=2
%x: f32[8, 6] = input
%w: f32[6, 48@tp] = input
%reshard: f32[6, (3@tp 16)] = shardc.reshard(%w, [6, (3@tp 16)])  # choose-factors
%mm: f32[8, 48] = aten.mm(%x, %reshard)
%view: f32[8, 3, 16] = aten.view(%mm, [8, 3, 16])
return (%view)""",
    )


def test_values_do_not_change():
    gm, _ = chosen(heads, TWO, "f32[6, 48@tp]")
    inputs = random_inputs(gm)
    before = on_one_device(build(heads, TWO, x="f32[8, 6]", w="f32[6, 48]"), inputs)
    assert torch.equal(on_one_device(gm, inputs)[0], before[0])


def test_every_use_of_the_parameter_sees_the_chosen_layout():
    def fn(x, w):
        return aten.view(aten.mm(x, w), [8, 3, 16]), aten.neg(w)

    gm, _ = chosen(fn, TWO, "f32[6, 48@tp]")
    (made,) = placeholders(gm)[1].users
    assert [n.name for n in made.users] == ["mm", "neg"]


def test_thirds_are_split_each_where_the_product_is_taken_apart():
    def fused(x, w):
        q, k, v = (aten.split_with_sizes(aten.mm(x, w), [16, 16, 16], 1)[i] for i in range(3))
        return aten.add(q, aten.mul(k, v))

    gm, _ = chosen(fused, TWO, "f32[6, 48@tp]")
    assert str(next(iter(placeholders(gm)[1].users)).meta["spec"]) == "[6, (3 16@tp)]"


def test_a_gather_changes_its_target_instead():
    def fn(x, w):
        return aten.view(aten.mm(x, reshard(w, "[6, 48@tp]")), [8, 3, 16])

    gm, changes = chosen(fn, TWO, "f32[6, 48]", compute=COLUMNS)
    assert changes == {"refined": 1} and len(placeholders(gm)[1].users) == 1
    assert str(next(iter(placeholders(gm)[1].users)).args[1]) == "[6, (3@tp 16)]"


# ---- left alone


def test_left_alone_where_the_split_lies_between_heads_already():
    def four(x, w):
        return aten.view(aten.mm(x, w), [8, 4, 12])

    gm, changes = chosen(four, TWO, "f32[6, 48@tp]")
    assert changes == {} and str(spec(placeholders(gm)[1])) == "[6, 48@tp]"


def test_left_alone_what_the_user_closed():
    assert chosen(heads, TWO, "f32[6, 48@tp]", open=())[1] == {}


def test_left_alone_where_no_view_takes_the_dim_apart():
    assert chosen(lambda x, w: aten.relu(aten.mm(x, w)), TWO, "f32[6, 48@tp]")[1] == {}


def test_left_alone_a_parameter_that_nothing_uses():
    assert chosen(lambda x, w: aten.relu(x), TWO, "f32[6, 48@tp]")[1] == {}


def test_left_alone_where_everything_is_whole():
    gm = build(heads, TWO, x="f32[8, 6]", w="f32[6, 48]")
    assert not +Counter(apply(ChooseFactors(), gm, context(gm, TWO, ("w",))).changes)


def test_fewer_heads_than_ranks_leave_ranks_without():
    gm, _ = chosen(heads, FOUR, "f32[6, 48@tp]")
    made = next(iter(placeholders(gm)[1].users)).meta["spec"]
    assert [made.local_shape(FOUR, FOUR.coords(r)) for r in range(4)] == [(6, 16), (6, 16), (6, 16), (6, 0)]
