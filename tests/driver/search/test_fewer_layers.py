"""A model with fewer of its equal layers stands for the whole; what is not so simple is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardc import FullyShard, Mesh, Plan, Replicated
from shardc.compiler.driver.decide import Options
from shardc.compiler.driver.search.costs import Costs
from shardc.compiler.driver.search.fewer_layers import fewer_layers
from shardc.compiler.driver.search.repeats import Repeats
from shardc.compiler.driver.search.search import Search
from shardc.compiler.ir.signature import Traced
from tests.driver.search.models import Between, Decoder, Differ, Stacks, Tied, Twice, ids


def search_of(model: nn.Module, *inputs: torch.Tensor) -> Search:
    one = Search(model, Mesh(dp=2, tp=2), Options(), float("inf"))
    one.traced = one._traced(inputs, {})
    return one


def costs_of(one: Search, stacks: list[str]) -> Costs:
    return Costs(one.model, one.mesh, one.traced, stacks, one._resolve, one.options)


def count(traced: Traced) -> int:
    return len(traced.gm.graph.nodes)


def test_seconds_and_bytes_are_those_of_the_whole():
    one = search_of(Decoder(layers=6), ids(4))
    fewer, whole = costs_of(one, ["layers"]), costs_of(one, [])
    assert count(fewer.fewer.short) < 0.7 * count(one.traced) == 0.7 * count(whole.fewer.short)
    assert fewer.fewer.whole(count) == count(one.traced)
    assert fewer.bound == pytest.approx(whole.bound, rel=1e-9)
    for plan in (Plan(dp=Replicated(), tp=FullyShard("layers.*")), Plan(dp=FullyShard("layers.*"), tp=Replicated())):
        short, full = fewer.estimate(plan, ("layers.*",)), whole.estimate(plan, ("layers.*",))
        assert short is not None and full is not None
        assert short == pytest.approx(full, rel=1e-9)


def test_two_stacks_are_cut_each():
    model = Stacks()
    traced = search_of(model, torch.randn(4, 8)).traced
    found = fewer_layers(traced, Repeats(model).outermost)
    assert [stack for stack, _ in found.stacks] == ["one", "two"]
    assert found.whole(count) == count(traced) > 2 * count(found.short)


def test_a_shared_parameter_is_one():
    """Its gradients are summed layer by layer, in the layers."""
    traced = search_of(Tied(), torch.randn(4, 8)).traced
    found = fewer_layers(traced, ["layers"])
    assert found.stacks and found.whole(count) == count(traced)


@pytest.mark.parametrize("make", [Twice, Between, Differ, lambda: Stacks(3, 4)])
def test_left_alone(make):
    """A result that is used behind other layers, calls between layers, layers that differ, and too few of them."""
    model = make()
    traced = search_of(model, torch.randn(4, 8)).traced
    found = fewer_layers(traced, ["one", "two"] if isinstance(model, Stacks) else ["layers"])
    assert found.short is traced and not found.longer and not found.stacks
    assert {found.weight(node) for node in traced.gm.graph.nodes if node.op != "output"} == {1}
