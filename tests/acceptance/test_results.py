"""What forward may return beside tensors in lists, tuples and dicts: objects, taken apart by their attributes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel

import shardc
from shardc import Mesh, Plan, Replicated, ShardingError


class Layer:
    """One layer's part of a cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.seen = keys, values, keys.shape[1]
        self.__dict__["a name"] = None


class Cache:
    """As generation keeps one: objects in a list in an object, and a class to make more of them."""

    kind = "cache"

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.make = Layer


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        cache = Cache()
        for _ in range(2):
            cache.layers.append(cache.make(self.k(x), self.v(x)))
        return {"loss": self.out(cache.layers[0].keys * cache.layers[1].values).sum(), "cache": cache}


@pytest.mark.parametrize("tp", [{}, {"tp": {"k": ColwiseParallel()}}], ids=["dp", "dp, tp"])
def test_an_object_of_tensors_is_made_anew_by_each_call(tp: Any):
    torch.manual_seed(0)
    model, x = Caching(), torch.randn(4, 5, 6)
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Plan(dp=Replicated(), **tp), mesh=Mesh(dp=2, **{name: 2 for name in tp}))
    have, again, want = compiled(x), compiled(x), alone(x)
    assert type(have["cache"]) is Cache and have["cache"] is not again["cache"] and have["cache"].make is Layer
    for found in (have, want):
        (found["loss"] + found["cache"].layers[1].values.square().sum()).backward()
    for one, other in zip(have["cache"].layers, want["cache"].layers, strict=True):
        assert type(one) is Layer and vars(one).keys() == vars(other).keys() and one.seen == other.seen == 5
        torch.testing.assert_close([one.keys, one.values], [other.keys, other.values])
    torch.testing.assert_close([p.grad for p in compiled.parameters()], [p.grad for p in alone.parameters()])


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Guarded(Layer):
    def __getstate__(self) -> dict[str, Any]:
        return {}


class Ring(Layer):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self.me = self


class Returning(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.l, self.make, self.kept = nn.Linear(4, 4), make, Layer(torch.zeros(1, 1), torch.zeros(1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.make(self, self.l(x))


CASES = {
    "slots": (lambda m, y: (y, Slotted(y)), "output[1] is a Slotted, which is neither"),
    "its own state": (lambda m, y: (y, Guarded(y, y)), "output[1] is a Guarded, which is neither"),
    "a cycle": (lambda m, y: (y, Ring(y, y)), "output[1].me is a Ring, which is neither"),
    "kept": (lambda m, y: (y, m.kept), "forward returns a Layer that is there before and after the call"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_objects_are_refused_by_name(case: str):
    make, says = CASES[case]
    compiled = shardc.compile(Returning(make), Replicated(), mesh=Mesh(dp=2))
    with pytest.raises(ShardingError) as refused:
        compiled(torch.randn(4, 4))
    assert says in str(refused.value)


def test_programs_that_return_objects_are_not_saved(tmp_path: Path):
    compiled = shardc.compile(Caching(), Replicated(), mesh=Mesh(dp=2))
    compiled.lower(torch.randn(4, 5, 6))
    with pytest.raises(ShardingError, match="cannot be saved"):
        compiled.save_programs(tmp_path / "programs")


class Attribute(nn.Module):
    def __init__(self, taken) -> None:
        super().__init__()
        self.up, self.taken = nn.Linear(4, 4), taken
        self.register_buffer("table", torch.arange(12.0).view(3, 4))

    def forward(self, x: Tensor):
        return self.up(x), self.taken(self, x)


BARE = {
    "of an input": lambda _, x: x.T,
    "matrices of it": lambda _, x: x.mT,
    "its data": lambda _, x: x.data,
    "of a buffer": lambda model, _: model.table.T,
    "of a parameter": lambda model, _: model.up.weight.data,
}
COMPUTED = {
    "of an input": lambda _, x: x.T * 1,
    "its data": lambda _, x: x.detach(),
    "of a buffer": lambda model, _: model.table.t(),
    "itself": lambda model, _: model.table,
}


@pytest.mark.parametrize("name", BARE)
def test_an_attribute_that_is_returned_as_it_is_is_refused(name: str):
    """Tracing sees no operator there: it once became a constant without memory, which ended the process."""
    compiled = shardc.compile(Attribute(BARE[name]), shardc.Replicated(), mesh=Mesh(dp=2))
    with pytest.raises(ShardingError, match="returns an attribute of a tensor"):
        compiled.lower(torch.randn(4, 4))


@pytest.mark.parametrize("name", COMPUTED)
def test_what_an_operator_makes_of_it_is_returned(name: str):
    model, x = Attribute(COMPUTED[name]), torch.randn(4, 4)
    want = model(x)[1].clone()
    compiled = shardc.compile(model, shardc.Replicated(), mesh=Mesh(dp=2), outputs=(None, shardc.Layout()))
    torch.testing.assert_close(compiled(x)[1], want)
