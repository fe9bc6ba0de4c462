"""Goldens of passes/shorten_views.py. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from expecttest import assert_expected_inline

from shardc.compiler.ir.text import text
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.shorten_views import ShortenViews
from tests.build import apply, context, local, random_inputs, simulated

aten = torch.ops.aten
DP = Mesh(dp=2)
TYPES = dict(x="f32[4@dp, 8, 6]", w="f32[6, 6]", tangent="f32[4@dp, 8, 6]")


def shortened(fn, marks: dict | None = None):
    gm = local(fn, DP, **TYPES)
    for node in gm.graph.nodes:
        node.meta |= (marks or {}).get(node.name, {})
    record = apply(ShortenViews(), gm, context(gm, DP))
    return gm, +Counter(record.changes)


def chains(x, w, tangent):
    y = aten.view(aten.view(x, [32, 6]), [4, 8, 2, 3])
    z = aten.mm(aten.view(x, [32, 6]), aten.t(aten.t(w)))
    rows = aten.view(aten.sum(z, [0], True), [6])
    return aten.relu(aten.transpose(aten.transpose(y, 1, 2), 2, 1)), aten.exp(aten.view(z, [32, 6])), rows


def test_only_the_ends_of_chains_are_left():
    gm, changes = shortened(chains)
    assert changes == {"chains": 1, "transposes": 2, "same": 1, "kept dims": 1}
    assert_expected_inline(
        text(gm, DP),
        """\
mesh dp=2
%x: f32[4@dp, 8, 6] = input
%w: f32[6, 6] = input
%tangent: f32[4@dp, 8, 6] = input
%reshape_default_1: f32[4@dp, 8, 2, 3] = aten.reshape(%x, [4@dp, 8, 2, 3])
%reshape_default_2: f32[32@dp, 6] = aten.reshape(%x, [32@dp, 6])
%mm: f32[32@dp, 6] = aten.mm(%reshape_default_2, %w)
%view_3: f32[6]+dp = aten.sum.dim_IntList(%mm, [0])  # shorten-views
%relu: f32[4@dp, 8, 2, 3] = aten.relu(%reshape_default_1)
%exp: f32[32@dp, 6] = aten.exp(%mm)
return (%relu, %exp, %view_3)""",
    )


def test_values_do_not_change():
    gm, _ = shortened(chains)
    inputs = random_inputs(gm)
    for have, want in zip(simulated(gm, DP, inputs), simulated(local(chains, DP, **TYPES), DP, inputs), strict=True):
        assert torch.equal(have, want)


def other_dims(x, w, tangent):
    return aten.relu(aten.transpose(aten.transpose(x, 1, 2), 0, 1))


def another_shape(x, w, tangent):
    return aten.relu(aten.view(x, [32, 6]))


def kept_dims_used(x, w, tangent):
    total = aten.sum(x, [1], True)
    return aten.mul(x, total), aten.view(total, [4, 6])


def more_than_dropped(x, w, tangent):
    return aten.view(aten.sum(x, [1], True), [2, 2, 6])


def two_reshapes(x, w, tangent):
    y = aten.view(aten.mul(x, 2), [4, 48])
    return aten.relu(y), aten.relu(aten.view(y, [4, 6, 8]))


def an_input_returned(x, w, tangent):
    return aten.t(aten.t(w))


@pytest.mark.parametrize("fn", [other_dims, another_shape, kept_dims_used, more_than_dropped, an_input_returned])
def test_left_alone(fn):
    assert not shortened(fn)[1]


def test_left_alone_in_backward_of_a_reshape_in_forward():
    gm = local(two_reshapes, DP, **TYPES)
    assert +Counter(apply(ShortenViews(), gm, context(gm, DP)).changes)
    gm = local(two_reshapes, DP, **TYPES)
    last = [n for n in gm.graph.nodes if n.target is aten.reshape.default][-1]
    last.meta["phase"] = "backward"
    assert not +Counter(apply(ShortenViews(), gm, context(gm, DP)).changes)


def test_left_alone_at_the_border_of_a_recomputed_region():
    gm = local(two_reshapes, DP, **TYPES)
    first = next(n for n in gm.graph.nodes if n.target is aten.reshape.default)
    first.meta["region"] = "layers.0"
    assert not +Counter(apply(ShortenViews(), gm, context(gm, DP)).changes)
