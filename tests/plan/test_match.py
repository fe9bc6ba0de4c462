"""Patterns over names, and the nearest name to a pattern that matches nothing."""

import pytest
from torch import nn

from shardc.compiler.plan.match import Names, claims, find, nearest

NAMES = ["", "net1", "net2", "layers", "layers.0", "layers.0.w1", "layers.1", "layers.1.w1", "layers.10.w1"]


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("net1", ["net1"]),
        ("net*", ["net1", "net2"]),
        ("net?", ["net1", "net2"]),
        ("net[2-9]", ["net2"]),
        ("net[!2]", ["net1"]),
        ("layers.*.w1", ["layers.0.w1", "layers.1.w1", "layers.10.w1"]),
        ("layers.?.w1", ["layers.0.w1", "layers.1.w1"]),
        ("layers.*", ["layers.0", "layers.1"]),
        ("", [""]),
        ("Net1", []),
    ],
)
def test_components_match_one_by_one(pattern: str, found: list[str]):
    assert find(pattern, NAMES) == found


def test_a_star_is_never_the_root():
    assert find("*", NAMES) == ["net1", "net2", "layers"]


def test_a_written_out_key_wins_over_patterns():
    found = claims(["layers.*.w1", "layers.1.w1", "layers.[01].w1"], NAMES)
    assert found == {
        "layers.0.w1": ["layers.*.w1", "layers.[01].w1"],
        "layers.1.w1": ["layers.1.w1"],
        "layers.10.w1": ["layers.*.w1"],
    }


@pytest.mark.parametrize(
    "key, name",
    [
        ("net3", "net1"),
        ("layer.*.w1", "layers.0.w1"),
        ("layers.1.w2", "layers.1.w1"),
        ("layers.7.w1", "layers.0.w1"),
        ("model.layers.*.w1", "layers.0.w1"),
    ],
)
def test_nearest(key: str, name: str):
    assert nearest(key, NAMES) == name


def test_nothing_is_nearest_among_no_names():
    assert nearest("net1", []) is None


def test_a_deep_model_costs_one_comparison_per_kind_of_layer(monkeypatch: pytest.MonkeyPatch):
    count = 0

    def ratio(self) -> float:
        nonlocal count
        count += 1
        return float(self.b == "layers.*.w1")

    monkeypatch.setattr("difflib.SequenceMatcher.ratio", ratio)
    names = [f"layers.{i}.w{k}" for i in range(100) for k in range(3)]
    nearest("layers.*.w9", names)
    assert count == 3 + 100


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = self.a
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.inner[0].weight = self.a.weight
        self.register_buffer("mask", self.a.bias.detach().clone())


def test_shared_things_are_known_under_every_name():
    model = Shared()
    names = Names(model)
    assert list(names.modules) == ["", "a", "b", "inner", "inner.0"]
    assert names.first("b") == "a"
    assert names.of(model.a.weight) == ["a.weight", "b.weight", "inner.0.weight"]
    assert names.of(nn.Linear(2, 2)) == []
    assert names.first("inner.0.weight") == "a.weight"
    inner = [("inner.0", "weight"), ("inner", "0.weight"), ("", "inner.0.weight")]
    assert list(names.around("inner.0.weight")) == inner
    assert list(names.around("b.bias")) == [("a", "bias"), ("", "b.bias")]
    assert list(names.buffers) == ["mask"]
    assert list(names.owned("b")) == ["weight", "bias"]
