"""Goldens of passes/overlap.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from shardc.compiler.analysis.bytes_moved import collectives_of
from shardc.compiler.analysis.memory import peak_bytes
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.halves import halves
from shardc.compiler.ir.text import text
from shardc.compiler.pipeline.runner import Context
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.overlap import Overlap
from tests.build import (
    all_gather,
    all_reduce,
    all_to_all,
    apply,
    context,
    local,
    random_inputs,
    reduce_scatter,
    simulated,
)

aten = torch.ops.aten
DP = Mesh(dp=2)
LAYER = dict(x="f32[8@dp, 4]", w="f32[4, 4]", tangent="f32[8@dp, 4]")


def layer(x, w, tangent):
    grad_w = all_reduce(aten.mm(aten.t(x), tangent), "dp")
    grad_x = aten.mm(tangent, aten.t(w))
    return aten.mm(x, w), grad_w, grad_x


def overlapped(fn, mesh: Mesh, gradients: tuple[str, ...] = (), step: Overlap | None = None, /, **types: str):
    gm = local(fn, mesh, **types)
    ctx = context(gm, mesh, gradients)
    apply(step or Overlap(), gm, ctx)
    return gm, ctx


def shown(gm: GraphModule, mesh: Mesh) -> str:
    """The program without its inputs."""
    return "\n".join(line for line in text(gm, mesh).splitlines() if " = input" not in line)


def order(gm: GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.op == "call_function"]


def test_a_reduction_starts_when_its_operand_is_ready_and_is_waited_for_at_the_end():
    gm, _ = overlapped(layer, DP, ("w", "x"), **LAYER)
    assert_expected_inline(
        shown(gm, DP),
        """\
mesh dp=2
%mm_2: f32[8@dp, 4] = aten.mm(%x, %w)
%t: f32[4, 8@dp] = aten.t(%x)
%mm: f32[4, 4]+dp = aten.mm(%t, %tangent)
%start_all_reduce: f32[4, 4] = shardc.start(%mm, all_reduce, dp)  # overlap
%t_1: f32[4, 4] = aten.t(%w)
%mm_1: f32[8@dp, 4] = aten.mm(%tangent, %t_1)
%all_reduce: f32[4, 4] = shardc.wait(%start_all_reduce)
return (%mm_2, %all_reduce, %mm_1)""",
    )


def test_forward_comes_before_backward():
    gm, ctx = overlapped(layer, DP, ("w", "x"), **LAYER)
    forward, backward = halves(gm, ctx.signature).forward, halves(gm, ctx.signature).backward
    assert backward is not None
    assert order(gm) == [*order(forward), *order(backward)] == ["mm_2", *order(backward)]


def test_start_and_wait_fall_into_one_half():
    gm, ctx = overlapped(layer, DP, ("w", "x"), **LAYER)
    parts = halves(gm, ctx.signature)
    assert parts.backward is not None
    for half in (parts.forward, parts.backward):
        names = order(half)
        assert ("start_all_reduce" in names) == ("all_reduce" in names)


def test_values_do_not_change():
    gm, _ = overlapped(layer, DP, ("w", "x"), **LAYER)
    before, inputs = local(layer, DP, **LAYER), random_inputs(gm)
    for have, want in zip(simulated(gm, DP, inputs), simulated(before, DP, inputs), strict=True):
        assert torch.equal(have, want)


def test_a_started_collective_counts_once_and_its_bytes_are_those_of_the_collective():
    gm, _ = overlapped(layer, DP, ("w", "x"), **LAYER)
    found, before = collectives_of(gm, DP), collectives_of(local(layer, DP, **LAYER), DP)
    assert [c._replace(name="") for c in found] == [c._replace(name="") for c in before]


# ---- gathers


def two_gathers(x, w, u):
    h = aten.relu(aten.relu(aten.mm(x, all_gather(w, 0, "dp"))))
    return aten.mm(h, all_gather(u, 0, "dp"))


SHARDS = dict(x="f32[8@dp, 4]", w="f32[4@dp, 4]", u="f32[4@dp, 4]")


def test_a_gather_is_started_early_and_waited_for_where_it_is_used():
    gm, _ = overlapped(two_gathers, DP, **SHARDS)
    assert_expected_inline(
        shown(gm, DP),
        """\
mesh dp=2
%all_gather: f32[4, 4] = shardc.all_gather(%w, 0, dp)
%start_all_gather_1: f32[4, 4] = shardc.start(%u, all_gather, 0, dp)  # overlap
%mm: f32[8@dp, 4] = aten.mm(%x, %all_gather)
%relu: f32[8@dp, 4] = aten.relu(%mm)
%relu_1: f32[8@dp, 4] = aten.relu(%relu)
%all_gather_1: f32[4, 4] = shardc.wait(%start_all_gather_1)
%mm_1: f32[8@dp, 4] = aten.mm(%relu_1, %all_gather_1)
return (%mm_1)""",
    )


def test_gathers_keep_within_the_number_ahead():
    def four(x, a, b, d, e):
        for w in (a, b, d, e):
            x = aten.mm(x, all_gather(w, 0, "dp"))
        return x

    types = {"x": "f32[8@dp, 4]"} | dict.fromkeys("abde", "f32[4@dp, 4]")
    for ahead in (1, 2, 3):
        gm, _ = overlapped(four, DP, (), Overlap(ahead=ahead), **types)
        assert _most_flying(gm) == ahead
        (have,), (want,) = (simulated(g, DP, random_inputs_of(g)) for g in (gm, local(four, DP, **types)))
        assert torch.equal(have, want)


def random_inputs_of(gm: GraphModule) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return random_inputs(gm)


def _most_flying(gm: GraphModule) -> int:
    flying = most = 0
    for node in gm.graph.nodes:
        flying += (node.target is c.start) - (node.target is c.wait)
        most = max(most, flying)
    return most


def test_a_gather_starts_no_earlier_than_the_window_lets_it():
    gm, _ = overlapped(two_gathers, DP, (), Overlap(window=63), **SHARDS)  # a gathered weight is 64 bytes
    assert _most_flying(gm) == 0
    gm, _ = overlapped(two_gathers, DP, (), Overlap(window=64), **SHARDS)
    assert _most_flying(gm) == 1


def test_the_peak_is_no_higher_with_one_gather_ahead_of_time_than_with_that_much_more():
    gm, ctx = overlapped(two_gathers, DP, **SHARDS)
    before = local(two_gathers, DP, **SHARDS)
    peaks = [peak_bytes(halves(g, ctx.signature), DP) for g in (before, gm)]
    assert peaks[0] <= peaks[1] <= peaks[0] + 64


# ---- reductions and the window


def three_gradients(x, w, tangent):
    grads = []
    for i in range(3):
        grads.append(all_reduce(aten.mm(aten.t(x), tangent), "dp"))
        tangent = aten.mul(tangent, i)
    return (aten.mm(x, w), *grads, tangent)


def test_the_oldest_reduction_is_waited_for_when_the_window_is_full():
    both, _ = overlapped(three_gradients, DP, ("w", "w", "w", "x"), Overlap(window=128), **LAYER)
    assert _most_flying(both) == 2
    names = order(both)
    assert names.index("all_reduce") < names.index("start_all_reduce_2") < names.index("all_reduce_1")
    single, _ = overlapped(three_gradients, DP, ("w", "w", "w", "x"), Overlap(window=64), **LAYER)
    assert _most_flying(single) == 1


def test_reductions_of_reductions_start_when_the_first_is_there():
    mesh = Mesh(pod=2, dp=2)

    def fn(x, w, tangent):
        grad = all_reduce(all_reduce(aten.mm(aten.t(x), tangent), "dp"), "pod")
        return aten.mm(x, w), grad, aten.mm(tangent, aten.t(w))

    types = dict(x="f32[8@pod.dp, 4]", w="f32[4, 4]", tangent="f32[8@pod.dp, 4]")
    gm, ctx = overlapped(fn, mesh, ("w", "x"), **types)
    names = order(gm)
    assert names.index("all_reduce") < names.index("all_reduce_1")
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, mesh, inputs), simulated(local(fn, mesh, **types), mesh, inputs), strict=True):
        assert torch.equal(have, want)


def test_any_kind_of_collective_may_be_started():
    def fn(x, y):
        a = all_to_all(aten.relu(x), 0, 1, "dp")
        return aten.neg(aten.relu(y)), aten.relu(a)

    gm, _ = overlapped(fn, DP, x="f32[8@dp, 4]", y="f32[8@dp, 4]")
    assert "%start_all_to_all: f32[8, 4@dp] = shardc.start(%relu, all_to_all, 0, 1, dp)" in text(gm, DP)
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, DP, inputs), (-inputs[1].relu(), inputs[0].relu()), strict=True):
        assert torch.equal(have, want)


def test_what_is_computed_again_in_backward_is_started_there_too():
    def fn(x, w, tangent):
        total = all_reduce(aten.mm(x, w), "dp")
        other = aten.neg(x)
        h = aten.relu(total)
        return other, h, aten.mul(h, tangent)

    types = dict(x="f32[8, 4@dp]", w="f32[4@dp, 4]", tangent="f32[8, 4]")
    gm = local(fn, DP, **types)
    for node in gm.graph.nodes:
        node.meta["region"] = node.op == "call_function" and node.meta["phase"] == "forward"
    ctx = context(gm, DP, ("w",))
    apply(Overlap(), gm, ctx)
    parts = halves(gm, ctx.signature)
    assert parts.backward is not None
    again = [n.name for n in parts.backward.graph.nodes if n.target in (c.start, c.wait)]
    assert again == ["start_all_reduce", "all_reduce"]


# ---- left alone


def needed_at_once(x, w, tangent):
    return aten.relu(all_reduce(aten.mm(aten.t(x), tangent), "dp")), aten.mm(x, w)


def only_views_between(x, w, tangent):
    total = all_reduce(aten.mm(aten.t(x), tangent), "dp")
    return aten.add(aten.t(w), total), w


def only_collectives_between(x, w, tangent):
    total = all_reduce(aten.mm(aten.t(x), tangent), "dp")
    gathered = all_gather(tangent, 0, "dp")
    return aten.relu(total), gathered


@pytest.mark.parametrize("fn", [needed_at_once, only_views_between, only_collectives_between])
def test_left_alone_without_computation_to_hide_behind(fn):
    gm, _ = overlapped(fn, DP, **LAYER)
    assert not {"start_all_reduce"} & set(order(gm))


def test_left_alone_over_one_rank():
    gm, _ = overlapped(layer, Mesh(dp=1), ("w", "x"), **LAYER)
    assert not [n for n in gm.graph.nodes if n.target is c.start]


def test_left_alone_across_the_border_of_forward_and_backward():
    """Only backward computes while the sum could fly, and only forward uses it."""

    def fn(x, w, tangent):
        grad = aten.mm(tangent, aten.t(w))
        return aten.relu(all_reduce(aten.sum(x), "dp")), grad

    gm, ctx = overlapped(fn, DP, ("x",), **LAYER)
    assert order(gm) == ["sum_1", "all_reduce", "relu", "t", "mm"]


def test_a_program_without_gradients_is_one_half():
    gm, ctx = overlapped(two_gathers, DP, **SHARDS)
    assert isinstance(ctx, Context) and halves(gm, ctx.signature).backward is None


def unit_gradients(count: int):
    """Gradients of as many units, each reduced and scattered."""

    def fn(x, w, tangent):
        grads = []
        for _ in range(count):
            grads.append(reduce_scatter(aten.mm(aten.t(x), tangent), 0, "dp"))
            tangent = aten.mul(tangent, 2)
        return (aten.mm(x, w), *grads, tangent)

    return fn


@pytest.mark.parametrize(("units", "flying"), [(True, 1), (False, 3)])
def test_the_gradients_of_one_unit_at_a_time_are_under_way(units: bool, flying: int):
    gm = local(unit_gradients(3), DP, **LAYER)
    for i, node in enumerate(n for n in gm.graph.nodes if n.target is c.reduce_scatter):
        node.meta |= {"unit": f"layers.{i}"} if units else {}
    apply(Overlap(), gm, context(gm, DP, ("w", "w", "w", "x")))
    assert _most_flying(gm) == flying
    assert order(gm)[-1 if units else -3].startswith("reduce_scatter")
