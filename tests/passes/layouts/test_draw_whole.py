"""passes/draw_whole.py: whole draws as one device makes them. EXPECTTEST_ACCEPT=1 rewrites goldens."""

import expecttest
import torch

from shardc import Mesh
from shardc.compiler.ir.text import text
from shardc.passes.layouts.draw_whole import DrawWhole
from tests.build import apply, build, context, on_one_device

aten = torch.ops.aten
MESH = Mesh(dp=2)


def whole(fn, **types):
    gm = build(fn, MESH, **types or {"x": "f32[8, 16]"})
    record = apply(DrawWhole(), gm, context(gm, MESH))
    return gm, record.changes


class TestGoldens(expecttest.TestCase):
    def test_zeros_that_lie_alike_stand_in_for_the_operand(self):
        gm, _ = whole(lambda x: aten.uniform(aten.t(x), 1.0, 2.0))
        self.assertExpectedInline(
            text(gm, MESH),
            """\
mesh dp=2
%x: f32[8, 16] = input
%zeros_default: f32[8, 16] = aten.zeros([8, 16], dtype=f32, device=cpu)  # draw-whole
%permute_default: f32[16, 8] = aten.permute(%zeros_default, [1, 0])  # draw-whole
%uniform: f32[16, 8] = aten.uniform(%permute_default, 1.0, 2.0)
return (%uniform)""",
        )

    def test_of_dropout_the_mask_is_drawn(self):
        gm, _ = whole(lambda x: aten.native_dropout(x, 0.5, True)[0])
        self.assertExpectedInline(
            text(gm, MESH),
            """\
mesh dp=2
%x: f32[8, 16] = input
%zeros_default: f32[8, 16] = aten.zeros([8, 16], dtype=f32, device=cpu)  # draw-whole
%native_dropout: (f32[8, 16], b8[8, 16]) = aten.native_dropout(%zeros_default, 0.5, True)
%getitem_1: b8[8, 16] = getitem(%native_dropout, 1)  # draw-whole
%mul_tensor: f32[8, 16] = aten.mul.Tensor(%x, %getitem_1)  # draw-whole
%mul_scalar: f32[8, 16] = aten.mul.Scalar(%mul_tensor, 2.0)  # draw-whole
return (%mul_scalar)""",
        )


def test_left_alone_where_the_operand_says_what_is_drawn():
    assert not whole(lambda x: (aten.bernoulli(x), aten.poisson(x), aten.multinomial(x, 2)))[1]


def test_draws_are_torch_s():
    def fn(x):
        y = aten.permute(x, [1, 2, 0])
        return aten.uniform(y), aten.native_dropout(y, 0.3, True)[0], aten.randn_like(y), aten.bernoulli(y, 0.2)

    gm, x = build(fn, MESH, x="f32[3, 8, 5]"), torch.randn(3, 8, 5)
    torch.manual_seed(4)
    expected = on_one_device(gm, [x])
    apply(DrawWhole(), gm, context(gm, MESH))
    torch.manual_seed(4)
    for have, want in zip(on_one_device(gm, [x]), expected, strict=True):
        assert torch.equal(have, want) and have.stride() == want.stride()
