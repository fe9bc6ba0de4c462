"""passes/number_draws.py: random operators become numbered draws. EXPECTTEST_ACCEPT=1 rewrites goldens."""

import expecttest
import pytest
import torch

import shardc
from shardc import Mesh, ShardingError
from shardc.compiler.ir.halves import halves
from shardc.compiler.ir.text import text
from shardc.passes.layouts.number_draws import NumberDraws
from tests.build import apply, build, context

aten = torch.ops.aten
MESH = Mesh(dp=2)


def numbered(fn, **types):
    gm = build(fn, MESH, **types or {"x": "f32[8, 16]"})
    record = apply(NumberDraws(), gm, context(gm, MESH))
    return gm, record.changes


class TestGoldens(expecttest.TestCase):
    def test_a_mask_is_a_comparison_of_bits(self):
        gm, changes = numbered(lambda x: aten.mul(x, aten.bernoulli(x, 0.9)))
        assert changes == {"numbered": 1}
        self.assertExpectedInline(
            text(gm, MESH),
            """\
mesh dp=2
%x: f32[8, 16] = input
%seed_default: i64[2] = shardc.seed(cpu)  # number-draws
%draw_default: i64[8, 16] = shardc.draw(%x, %seed_default, 0, 53)  # number-draws
%lt_scalar: b8[8, 16] = aten.lt.Scalar(%draw_default, 8106479329266893)  # number-draws
%_to_copy_default: f32[8, 16] = aten._to_copy(%lt_scalar, dtype=f32)  # number-draws
%mul: f32[8, 16] = aten.mul.Tensor(%x, %_to_copy_default)
return (%mul)""",
        )

    def test_one_seed_serves_all_draws_and_each_has_its_number(self):
        gm, changes = numbered(lambda x: (aten.native_dropout(x, 0.5, True)[0], aten.bernoulli(x, 0.25)))
        assert changes == {"numbered": 2}
        self.assertExpectedInline(
            text(gm, MESH),
            """\
mesh dp=2
%x: f32[8, 16] = input
%seed_default: i64[2] = shardc.seed(cpu)  # number-draws
%draw_default: i64[8, 16] = shardc.draw(%x, %seed_default, 0, 53)  # number-draws
%lt_scalar: b8[8, 16] = aten.lt.Scalar(%draw_default, 4503599627370496)  # number-draws
%mul_tensor: f32[8, 16] = aten.mul.Tensor(%x, %lt_scalar)  # number-draws
%mul_scalar: f32[8, 16] = aten.mul.Scalar(%mul_tensor, 2.0)  # number-draws
%draw_default_1: i64[8, 16] = shardc.draw(%x, %seed_default, 4, 53)  # number-draws
%lt_scalar_1: b8[8, 16] = aten.lt.Scalar(%draw_default_1, 2251799813685248)  # number-draws
%_to_copy_default: f32[8, 16] = aten._to_copy(%lt_scalar_1, dtype=f32)  # number-draws
return (%mul_scalar, %_to_copy_default)""",
        )


def test_left_alone_where_only_torch_can_draw():
    gm, changes = numbered(
        lambda x, n: (aten.poisson(x), aten.randint_like(n, -(2**63), 2**63 - 1)), x="f32[8, 16]", n="i64[8]"
    )
    assert not changes
    assert [n.name for n in gm.graph.nodes if n.op == "call_function"] == ["poisson", "randint_like"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda x: aten.bernoulli(x, 1.5), "p to be in [0, 1]"),
        (lambda x: aten.uniform(x, 2.0, 1.0), "[from, to)"),
        (lambda x: aten.random(x, 0), "to be less than 'to'"),
    ],
)
def test_what_torch_refuses_to_draw_is_refused(draw, said):
    with pytest.raises(ShardingError) as error:
        numbered(draw)
    assert said in str(error.value)


def test_recomputed_masks_are_drawn_again_from_the_saved_seed():
    def fn(x, tangent):
        mask = aten.bernoulli(x, 0.9)
        return aten.mul(x, mask), aten.mul(tangent, mask)

    gm = build(fn, MESH, x="f32[8, 16]", tangent="f32[8, 16]")
    for node in gm.graph.nodes:
        node.meta["region"] = "net" if node.name in ("bernoulli", "mul") else None
    ctx = context(gm, MESH, ("x",), params={})
    apply(NumberDraws(), gm, ctx)
    found = halves(gm, ctx.signature)
    assert found.saved == ("x", "seed_default")  # x for its shape only, until the draw is spelled out


def test_a_program_saves_the_seed_and_no_mask():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    compiled = shardc.compile(model, shardc.Replicated(), mesh=MESH, recompute="1")
    halved = compiled.lower(torch.randn(6, 4)).halves
    assert halved.saved == ("input_1", "all_reduce_2")
