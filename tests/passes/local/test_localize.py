"""Goldens of passes/localize.py, and random calls of operators on random layouts. EXPECTTEST_ACCEPT=1 rewrites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule

from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.passes.layouts.propagate import Propagate
from shardc.passes.local.localize import Localize
from shardc.passes.reshards.insert_reshards import InsertReshards
from shardc.passes.reshards.lower_reshards import LowerReshards
from tests.build import all_reduce, apply, build, context, local, on_one_device, random_inputs, simulated
from tests.spec.test_spec import specs

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=4)
SMALL = Mesh(a=2, b=3)


def lines(gm: GraphModule, mesh: Mesh = MESH) -> str:
    return "\n".join(line for line in text(gm, mesh).splitlines() if " = input" not in line)


def same_on_all_ranks(fn, mesh: Mesh = MESH, **types: str) -> None:
    """The local program on all ranks gives what the original gives on one device."""
    before = build(fn, mesh, **types)
    inputs = random_inputs(before)
    for have, want in zip(
        simulated(local(fn, mesh, **types), mesh, inputs), on_one_device(before, inputs), strict=True
    ):
        assert torch.equal(have, want)


# ---- sizes in arguments


def heads(x, w):
    return aten.view(aten.mm(x, w), [8, 3, 4])


def test_sizes_of_a_view_become_the_ranks_own():
    gm = local(heads, MESH, x="f32[8@dp, 6]", w="f32[6, (3@tp 4)]")
    assert_expected_inline(
        lines(gm),
        """\
mesh dp=2 tp=4
%mm: f32[8@dp, (3@tp 4)] = aten.mm(%x, %w)
%reshape_default: f32[8@dp, 3@tp, 4] = aten.reshape(%mm, [8@dp, 3@tp, 4])
return (%reshape_default)""",
    )
    same_on_all_ranks(heads, x="f64[8@dp, 6]", w="f64[6, (3@tp 4)]")


def test_the_program_is_one_text_though_ranks_differ():
    gm = local(heads, MESH, x="f64[8@dp, 6]", w="f64[6, (3@tp 4)]")
    held = [n.meta["spec"].local_shape(MESH, MESH.coords(r)) for r in (0, 7) for n in returned(gm)]
    assert held == [(4, 1, 4), (4, 0, 4)]


def test_sizes_of_an_expanded_dim():
    def fn(x, y):
        return aten.add(aten.expand(x, [8, 5]), y)

    gm = local(fn, MESH, x="f32[8@tp, 1]", y="f32[8@tp, 5]")
    assert "aten.expand(%x, [8@tp, 5])" in text(gm, MESH)
    same_on_all_ranks(fn, x="f64[8@tp, 1]", y="f64[8@tp, 5]")


@pytest.mark.parametrize("n", [1, 3, 4, 5, 13])
def test_uneven_and_empty_pieces(n: int):
    def fn(x, w):
        y = aten.relu(aten.view(aten.mm(x, w), [n, 2, 2]))
        return aten.sum(all_reduced(aten.sum(y, [0])), [0])

    def all_reduced(y):
        return all_reduce(y, "tp")

    same_on_all_ranks(fn, x=f"f64[{n}@tp, 3]", w="f64[3, 4]")


# ---- what stands beside the rules


def test_a_rule_may_say_how_its_operator_becomes_local():
    gm = local(lambda x: aten.tril(x), MESH, x="f32[8@tp, 8]")
    assert_expected_inline(
        lines(gm),
        """\
mesh dp=2 tp=4
%tril_default: f32[8@tp, 8] = aten.tril(%x, start(8@tp))
return (%tril_default)""",
    )
    same_on_all_ranks(lambda x: aten.tril(x), x="f64[7@tp, 8]")


@pytest.mark.parametrize("view", [aten.view, aten._unsafe_view])
def test_a_view_becomes_a_reshape_even_where_nothing_is_split(view):
    """What it views may be a piece that lies in memory otherwise than the whole did."""
    gm = local(lambda x: view(x, [32]), MESH, x="f32[8, 4]")
    assert [n.target for n in gm.graph.nodes][1] is aten.reshape.default


def test_steps_inside_an_operator_keep_its_source_and_say_who_made_them():
    gm = build(lambda x: aten.tril(x), MESH, Stage.RESHARDED, x="f32[8@tp, 8]")
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.tril.default)
    node.meta |= {"where": "mask.py:2 in forward", "path": "attn"}
    apply(Localize(), gm, context(gm, MESH))
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.tril.default)
    assert (node.meta["where"], node.meta["path"]) == ("mask.py:2 in forward", "attn")
    assert str(node.meta["spec"]) == "[8@tp, 8]"


# ---- left alone


def test_left_alone_calls_on_whole_values():
    gm = build(lambda x: aten.tril(aten.expand(x, [8, 8])), MESH, Stage.RESHARDED, x="f32[8, 1]")
    before = text(gm, MESH)
    assert not +Counter(apply(Localize(), gm, context(gm, MESH)).changes)
    assert text(gm, MESH) == before


def test_left_alone_operators_that_are_local_as_they_stand():
    gm = build(lambda x, w: aten.relu(aten.mm(x, w)), MESH, Stage.RESHARDED, x="f32[8@dp, 6]", w="f32[6, 12@tp]")
    before = text(gm, MESH)
    assert not +Counter(apply(Localize(), gm, context(gm, MESH)).changes)
    assert text(gm, MESH) == before


def test_left_alone_operators_without_a_rule():
    gm = build(lambda x: aten.frobenius_norm.dim(x, [1]), MESH, Stage.RESHARDED, x="f32[8, 6]")
    assert not +Counter(apply(Localize(), gm, context(gm, MESH)).changes)


# ---- any call on any layouts


def size(x, i: int) -> int:
    return x.node.meta["val"].shape[i]


def rank(x) -> int:
    return x.node.meta["val"].dim()


CALLS: dict[str, Callable] = {
    "relu": lambda x: aten.relu(x),
    "mul": lambda x: aten.mul(x, aten.neg(x)),
    "add": lambda x: aten.add(x, aten.relu(x)),
    "sum": lambda x: aten.sum(x, [0]),
    "sum all": lambda x: aten.sum(x),
    "amax": lambda x: aten.amax(x, [-1]),
    "flat": lambda x: aten.view(x, [-1]),
    "flip": lambda x: aten.permute(x, list(reversed(range(rank(x))))),
    "cat": lambda x: aten.cat([x, aten.neg(x)], 0),
    "outer": lambda x: aten.mul(aten.unsqueeze(x, 0), aten.unsqueeze(x, 1)),
    "gram": lambda x: aten.mm(aten.view(x, [size(x, 0), -1]), aten.t(aten.view(x, [size(x, 0), -1]))),
    "slice": lambda x: aten.slice(x, 0, 1, 3),
    "select": lambda x: aten.select(x, -1, 0),
    "cumsum": lambda x: aten.cumsum(x, 0),
    "softmax": lambda x: aten.eq(aten._softmax(x, -1, False), aten._softmax(x, -1, False)),
    "where": lambda x: aten.where(aten.gt(x, 0), x, aten.neg(x)),
    "argmax": lambda x: aten.argmax(x, 0),
    "split": lambda x: aten.split_with_sizes(x, [1, size(x, 0) - 1], 0)[1],
    "repeat": lambda x: aten.repeat(x, [2] + [1] * (rank(x) - 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@given(layout=st.deferred(lambda: specs(SMALL)))
def test_any_call_on_any_layout_gives_the_same_on_all_ranks(name: str, layout: Spec):
    pending = {a: "sum" for a, _ in layout.pending}
    types = {"x": layout.with_pending(pending, SMALL).text(torch.float64)}
    gm = build(CALLS[name], SMALL, **types)
    inputs = random_inputs(gm)
    expected = on_one_device(gm, inputs)
    ctx = context(gm, SMALL)
    for step in (Propagate(), InsertReshards(), LowerReshards(), Localize()):
        apply(step, gm, ctx)
    for have, want in zip(simulated(gm, SMALL, inputs), expected, strict=True):
        assert torch.equal(have, want)
