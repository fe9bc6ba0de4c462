"""Gradients that are reduced whole: goldens of passes/join_messages.py. EXPECTTEST_ACCEPT=1 rewrites them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from shardc.compiler.analysis.bytes_moved import collectives_of
from shardc.compiler.ir.collectives import all_reduce as ALL_REDUCE
from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.join_messages import JoinMessages
from tests.build import all_gather, all_reduce, apply, context, local, random_inputs, reduce_scatter, simulated

aten = torch.ops.aten
DP, BOTH = Mesh(dp=2), Mesh(pod=2, dp=2, tp=2)
LAYERS = dict(x="f32[8@dp, 4]", w="f32[4, 4]", u="f32[4, 4]", tangent="f32[8@dp, 4]")


def two_layers(x, w, u, tangent):
    h = aten.mm(x, w)
    grad_u = aten.mm(aten.t(h), tangent)
    grad_w = aten.mm(aten.t(x), aten.mm(tangent, aten.t(u)))
    return aten.mm(h, u), average(grad_w), average(grad_u)


def average(grad):
    return aten.div(all_reduce(grad, "dp"), 2)


def bucketed(fn, mesh: Mesh, gradients: tuple[str, ...], types: dict[str, str], **plan: Any) -> GraphModule:
    gm = local(fn, mesh, **types)
    plan.setdefault("data_axes", ("dp",))
    apply(JoinMessages(), gm, context(gm, mesh, gradients, **plan))
    return gm


def reductions(gm: GraphModule) -> list[int]:
    """How many values each all_reduce moves, in order."""
    found = [n.args[0] for n in gm.graph.find_nodes(op="call_function", target=ALL_REDUCE)]
    return [len(values) if isinstance(values, list) else 1 for values in found]


def test_gradients_are_reduced_as_one_as_soon_as_the_last_is_there():
    gm = bucketed(two_layers, DP, ("w", "u"), LAYERS)
    assert_expected_inline(
        text(gm, DP),
        """\
mesh dp=2
%x: f32[8@dp, 4] = input
%w: f32[4, 4] = input
%u: f32[4, 4] = input
%tangent: f32[8@dp, 4] = input
%mm: f32[8@dp, 4] = aten.mm(%x, %w)
%t: f32[4, 8@dp] = aten.t(%mm)
%mm_1: f32[4, 4]+dp = aten.mm(%t, %tangent)
%t_1: f32[4, 8@dp] = aten.t(%x)
%t_2: f32[4, 4] = aten.t(%u)
%mm_2: f32[8@dp, 4] = aten.mm(%tangent, %t_2)
%mm_3: f32[4, 4]+dp = aten.mm(%t_1, %mm_2)
%all_reduce_2: (f32[4, 4], f32[4, 4]) = shardc.all_reduce([%mm_1, %mm_3], dp)  # join-messages
%mm_4: f32[8@dp, 4] = aten.mm(%mm, %u)
%getitem: f32[4, 4] = getitem(%all_reduce_2, 0)  # join-messages
%getitem_1: f32[4, 4] = getitem(%all_reduce_2, 1)  # join-messages
%div: f32[4, 4] = aten.div.Tensor(%getitem_1, 2)
%div_1: f32[4, 4] = aten.div.Tensor(%getitem, 2)
return (%mm_4, %div, %div_1)""",
    )


def test_buckets_hold_at_most_their_bytes():
    def gradients(x, a, b, c, d, tangent):
        grads = [aten.mm(aten.t(x), aten.mul(tangent, i)) for i in range(4)]
        return (aten.mm(x, a), *(all_reduce(g, "dp") for g in grads))

    names = ("a", "b", "c", "d")
    types = {"x": "f32[8@dp, 4]", "tangent": "f32[8@dp, 4]"} | dict.fromkeys(names, "f32[4, 4]")
    sizes = {
        limit: reductions(bucketed(gradients, DP, names, types, bucket_bytes={"dp": limit}))
        for limit in (64, 100, 128, 191, 192, 999)
    }
    assert sizes == {64: [1] * 4, 100: [1] * 4, 128: [2, 2], 191: [2, 2], 192: [3, 1], 999: [4]}


def test_eight_parameters_are_as_many_reductions_as_buckets_and_all_but_the_last_begin_in_time():
    names = tuple("abcdefgh")

    def chain(x, a, b, c, d, e, f, g, h, tangent):
        weights = [a, b, c, d, e, f, g, h]
        values = [x]
        for w in weights:
            values.append(aten.mm(values[-1], w))
        grads, grad = {}, tangent
        for i in reversed(range(8)):
            grads[i] = aten.mm(aten.t(values[i]), grad)
            grad = aten.mm(grad, aten.t(weights[i]))
        return (values[-1], *(average(grads[i]) for i in range(8)))

    types = {"x": "f32[8@dp, 4]", "tangent": "f32[8@dp, 4]"} | dict.fromkeys(names, "f32[4, 4]")
    gm = bucketed(chain, DP, names, types, bucket_bytes={"dp": 192})  # each is 64
    order = list(gm.graph.nodes)
    sums = [n for n in order if n.target is ALL_REDUCE]
    last = max(order.index(value) for n in sums for value in n.all_input_nodes)
    assert [order.index(n) < last for n in sums] == [True, True, False]
    assert reductions(gm) == [3, 3, 2]  # 512 bytes in buckets of 192


def test_gradients_of_one_bucket_may_differ_in_size_between_ranks():
    def fn(x, w, u, tangent):
        y = aten.mm(x, w)
        grad_w = aten.mm(aten.t(x), aten.mm(tangent, aten.t(u)))
        grad_u = aten.mm(aten.t(y), tangent)
        return all_reduce(aten.mm(y, u), "tp"), average(grad_w), average(grad_u)

    types = dict(x="f64[6@dp, 3]", w="f64[3, 5@tp]", u="f64[5@tp, 3]", tangent="f64[6@dp, 3]")
    mesh = Mesh(dp=2, tp=2)
    gm, before = bucketed(fn, mesh, ("w", "u"), types), local(fn, mesh, **types)
    assert "(f64[3, 5@tp], f64[5@tp, 3]) = shardc.all_reduce([%mm_2, %mm_3], dp)" in text(gm, mesh)
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, mesh, inputs), simulated(before, mesh, inputs), strict=True):
        assert torch.equal(have, want)


def test_values_do_not_change():
    gm, before = bucketed(two_layers, DP, ("w", "u"), LAYERS), local(two_layers, DP, **LAYERS)
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, DP, inputs), simulated(before, DP, inputs), strict=True):
        assert torch.equal(have, want)


def test_reductions_over_two_mesh_dims_are_bucketed_as_a_pair():
    def fn(x, w, u, tangent):
        h = aten.mm(x, w)
        grads = aten.mm(aten.t(x), tangent), aten.mm(aten.t(h), tangent)
        return (aten.mm(h, u), *(all_reduce(all_reduce(g, "pod"), "dp") for g in grads))

    types = dict(x="f32[8@pod.dp, 4]", w="f32[4, 4]", u="f32[4, 4]", tangent="f32[8@pod.dp, 4]")
    gm = bucketed(fn, BOTH, ("w", "u"), types, data_axes=("pod", "dp"))
    assert reductions(gm) == [2, 2]
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, BOTH, inputs), simulated(local(fn, BOTH, **types), BOTH, inputs), strict=True):
        assert torch.equal(have, want)


def test_different_averages_are_taken_from_the_views():
    def fn(x, w, u, tangent):
        h = aten.mm(x, w)
        grads = all_reduce(aten.mm(aten.t(x), tangent), "dp"), all_reduce(aten.mm(aten.t(h), tangent), "dp")
        return aten.mm(h, u), aten.div(grads[0], 2), grads[1]

    gm = bucketed(fn, DP, ("w", "u"), LAYERS)
    assert_expected_inline(
        "\n".join(text(gm, DP).splitlines()[-8:]),
        """\
%t_1: f32[4, 8@dp] = aten.t(%mm)
%mm_2: f32[4, 4]+dp = aten.mm(%t_1, %tangent)
%all_reduce_2: (f32[4, 4], f32[4, 4]) = shardc.all_reduce([%mm_1, %mm_2], dp)  # join-messages
%mm_3: f32[8@dp, 4] = aten.mm(%mm, %u)
%getitem: f32[4, 4] = getitem(%all_reduce_2, 0)  # join-messages
%getitem_1: f32[4, 4] = getitem(%all_reduce_2, 1)  # join-messages
%div: f32[4, 4] = aten.div.Tensor(%getitem, 2)
return (%mm_3, %div, %getitem_1)""",
    )


def test_what_travels_is_cast():
    gm = bucketed(two_layers, DP, ("w", "u"), LAYERS, reduce_dtype={"dp": torch.bfloat16})
    assert_expected_inline(
        "\n".join(text(gm, DP).splitlines()[-11:]).replace("_to_copy_default", "cast"),
        """\
%cast: bf16[4, 4]+dp = aten._to_copy(%mm_1, dtype=bf16)  # join-messages
%cast_1: bf16[4, 4]+dp = aten._to_copy(%mm_3, dtype=bf16)  # join-messages
%all_reduce_2: (bf16[4, 4], bf16[4, 4]) = shardc.all_reduce([%cast, %cast_1], dp)  # join-messages
%mm_4: f32[8@dp, 4] = aten.mm(%mm, %u)
%getitem: bf16[4, 4] = getitem(%all_reduce_2, 0)  # join-messages
%cast_2: f32[4, 4] = aten._to_copy(%getitem, dtype=f32)  # join-messages
%getitem_1: bf16[4, 4] = getitem(%all_reduce_2, 1)  # join-messages
%cast_3: f32[4, 4] = aten._to_copy(%getitem_1, dtype=f32)  # join-messages
%div: f32[4, 4] = aten.div.Tensor(%cast_3, 2)
%div_1: f32[4, 4] = aten.div.Tensor(%cast_2, 2)
return (%mm_4, %div, %div_1)""",
    )
    (moved,) = collectives_of(gm, DP)
    assert (moved.dtype, moved.numel, moved.bytes_on_wire) == (torch.bfloat16, 32, 64)


def test_what_travels_alone_is_cast_too():
    gm = bucketed(two_layers, DP, ("w", "u"), LAYERS, reduce_dtype={"dp": torch.bfloat16}, bucket_bytes={"dp": 1})
    assert reductions(gm) == [1, 1]
    assert {c.dtype for c in collectives_of(gm, DP)} == {torch.bfloat16}
    assert {n.meta["val"].dtype for n in returned(gm)} == {torch.float32}
    gm = bucketed(one_shard, DP, ("w",), SHARD, reduce_dtype={"dp": torch.bfloat16})
    assert_expected_inline(
        "\n".join(text(gm, DP).splitlines()[-6:]),
        """\
%reduce_scatter_1: bf16[4@dp, 4] = shardc.reduce_scatter(%_to_copy_default, 0, dp)  # join-messages
%all_gather: f32[4, 4] = shardc.all_gather(%w, 0, dp)
%mm_1: f32[8@dp, 4] = aten.mm(%x, %all_gather)
%_to_copy_default_1: f32[4@dp, 4] = aten._to_copy(%reduce_scatter_1, dtype=f32)  # join-messages
%div: f32[4@dp, 4] = aten.div.Tensor(%_to_copy_default_1, 2)
return (%mm_1, %div)""",
    )


SHARD = dict(x="f32[8@dp, 4]", w="f32[4@dp, 4]", tangent="f32[8@dp, 4]")


def one_shard(x, w, tangent):
    grad = reduce_scatter(aten.mm(aten.t(x), tangent), 0, "dp")
    return aten.mm(x, all_gather(w, 0, "dp")), aten.div(grad, 2)


def test_a_cast_leaves_integers_in_their_dtype():
    types = {k: t.replace("f32", "i64") for k, t in LAYERS.items()}

    def fn(x, w, u, tangent):
        return x, *(all_reduce(aten.mm(aten.t(x), aten.mul(tangent, i)), "dp") for i in (1, 2))

    gm = bucketed(fn, DP, ("w", "u"), types, reduce_dtype={"dp": torch.bfloat16})
    assert {c.dtype for c in collectives_of(gm, DP)} == {torch.int64}


def test_shards_of_scattered_gradients_are_bucketed_over_their_replicas():
    def fn(x, w, u, tangent):
        h = aten.mm(x, all_gather(w, 0, "dp"))
        grads = aten.mm(aten.t(x), tangent), aten.mm(aten.t(h), tangent)
        y = aten.mm(h, all_gather(u, 0, "dp"))
        return (y, *(aten.div(all_reduce(reduce_scatter(g, 0, "dp"), "pod"), 4) for g in grads))

    types = dict(x="f32[8@pod.dp, 4]", w="f32[4@dp, 4]", u="f32[4@dp, 4]", tangent="f32[8@pod.dp, 4]")
    gm = bucketed(fn, BOTH, ("w", "u"), types, data_axes=("pod", "dp"), reduce_dtype={"dp": torch.bfloat16})
    moved = [c for c in collectives_of(gm, BOTH) if c.phase == "backward"]
    assert [(c.kind, c.mesh_dim, c.numel, c.dtype) for c in moved] == [
        ("reduce_scatter", "dp", 16, torch.bfloat16),
        ("reduce_scatter", "dp", 16, torch.bfloat16),
        ("all_reduce", "pod", 16, torch.float32),
    ]
    inputs = random_inputs(gm)  # small integers: bfloat16 holds them
    for have, want in zip(simulated(gm, BOTH, inputs), simulated(local(fn, BOTH, **types), BOTH, inputs), strict=True):
        assert torch.equal(have, want)


# ---- left alone


def forward_sum(x, w, u, tangent):
    return average(aten.mm(aten.t(x), x)), aten.mul(w, 2), aten.mul(u, 2)


def used_again(x, w, u, tangent):
    a, b = (average(aten.mm(aten.t(x), aten.mul(tangent, i))) for i in (1, 2))
    return aten.add(a, b), a, b


def reduced_midway(x, w, u, tangent):
    a, b = (aten.relu(average(aten.mm(aten.t(x), aten.mul(tangent, i)))) for i in (1, 2))
    return x, a, b


@pytest.mark.parametrize("fn", [forward_sum, used_again, reduced_midway])
def test_left_alone_what_is_not_the_last_step_of_a_gradient(fn):
    assert 2 not in reductions(bucketed(fn, DP, ("w", "u"), LAYERS))


def test_left_alone_the_gradients_of_inputs():
    gm = local(two_layers, DP, **LAYERS)
    ctx = context(gm, DP, (), data_axes=("dp",))
    assert not +Counter(apply(JoinMessages(), gm, ctx).changes)


def test_left_alone_over_mesh_dims_that_split_no_batch():
    assert 2 not in reductions(bucketed(two_layers, DP, ("w", "u"), LAYERS, data_axes=()))


def test_left_alone_over_one_rank():
    assert 2 not in reductions(bucketed(two_layers, Mesh(dp=1), ("w", "u"), LAYERS))


def test_left_alone_a_single_gradient():
    assert "join-messages" not in text(bucketed(one_shard, DP, ("w",), SHARD), DP)


def test_left_alone_gradients_of_different_dtypes():
    def fn(x, w, u, tangent, tangent_of_x):
        return x, average(aten.mm(aten.t(x), tangent)), average(aten.mm(aten.t(tangent_of_x), tangent_of_x))

    types = LAYERS | {"u": "f64[4, 4]", "tangent_of_x": "f64[8@dp, 4]"}
    assert 2 not in reductions(bucketed(fn, DP, ("w", "u"), types))


def test_left_alone_gradients_over_different_mesh_dims():
    def fn(x, w, u, tangent, tangent_of_x):
        grad = all_reduce(aten.mm(aten.t(tangent_of_x), tangent_of_x), "dp")
        return x, all_reduce(aten.mm(aten.t(x), tangent), "dp"), all_reduce(grad, "pod")

    types = LAYERS | {"tangent_of_x": "f32[8@pod.dp, 4]"}
    assert 2 not in reductions(bucketed(fn, BOTH, ("w", "u"), types, data_axes=("pod", "dp")))


def test_left_alone_the_first_gradient_larger_than_a_bucket():
    types = LAYERS | {"u": "f32[4, 4]"}
    gm = bucketed(two_layers, DP, ("w", "u"), types, bucket_bytes={"dp": 63})
    assert reductions(gm) == [1, 1]


def test_left_alone_gradients_whose_copy_costs_more_than_a_collective():
    large = dict(x="f32[8@dp, 4]", w="f32[4, 4]", u="f32[4, 65536]", tangent="f32[8@dp, 65536]")  # u: 1 MiB
    assert reductions(bucketed(two_layers, DP, ("w", "u"), large)) == [1, 1]
    smaller = dict(x="f32[8@dp, 4]", w="f32[4, 4]", u="f32[4, 65535]", tangent="f32[8@dp, 65535]")
    assert reductions(bucketed(two_layers, DP, ("w", "u"), smaller)) == [2]


def test_a_gradient_that_travels_alone_keeps_no_bucket_from_filling():
    def gradients(x, a, b, c, tangent, wide):
        grads = [aten.mm(aten.t(x), t) for t in (tangent, wide, aten.mul(tangent, 2))]
        return (aten.mm(x, a), *(all_reduce(g, "dp") for g in grads))

    types = dict(x="f32[8@dp, 4]", a="f32[4, 4]", b="f32[4, 65536]", c="f32[4, 4]")
    types |= dict(tangent="f32[8@dp, 4]", wide="f32[8@dp, 65536]")
    assert sorted(reductions(bucketed(gradients, DP, ("a", "b", "c"), types))) == [1, 2]
