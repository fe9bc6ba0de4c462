"""What forward sets elsewhere is set by every call, as one device sets it, or refused by name."""

from __future__ import annotations

import copy
import re
import time
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import Mesh, Plan, Replicated, ShardingError
from tests.acceptance.compare import USUAL

SEEN: list[Any] = []
COUNT = 0


class Notes:
    y: Tensor | None = None


class Sets(nn.Module):
    """Sets one thing of each sort, and returns what does not depend on it."""

    def __init__(self, state: type) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.aux_loss: Any = 0.0
        self.losses: list[Tensor] = []
        self.last: deque[Tensor] = deque(maxlen=2)
        self.kept: dict[str, Any] = {"old": 1, "going": 2}
        self.state = state(mean=None, tags=set(), inner={"list": [1]})

    def forward(self, x: Tensor, cache: dict[str, Any], items: list[Any], notes: Notes) -> Tensor:
        y = self.fc(x)
        self.aux_loss = y.square().mean()
        self.losses.append(y.abs().mean())
        self.kept["new"] = {"y": y.detach(), "n": 3}
        self.kept.pop("going", None)
        self.state.mean = y.mean(0)
        self.state.tags.add("seen")
        self.state.inner["list"][0] = 5
        cache["k"] = torch.cat([cache["k"], y]) if "k" in cache else y
        items[:] = [items[0], y.sum(), "end"]
        notes.y = y * 2
        return y * 3


class State:
    """As a SimpleNamespace, and Dynamo sees what is set on it."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize("state", [State, SimpleNamespace], ids=["seen by Dynamo", "by dispatch"])
def test_what_forward_sets_is_what_one_device_sets(state: type):
    torch.manual_seed(0)
    model = Sets(state)
    alone, x = copy.deepcopy(model), torch.randn(4, 4)
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))
    given: list[Any] = [({}, ["start", 1, 2], Notes()) for _ in range(2)]
    for step in range(2):
        for m, call in zip((compiled, alone), given, strict=True):
            call[1][1:], call[2].y = [1, 2], None
            call[0].update((key, value.detach()) for key, value in call[0].items())
            (m(x, *call).sum() + m.aux_loss + m.losses[-1] + call[0]["k"].sum()).backward()
        for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **USUAL)
        for name in ("aux_loss", "losses", "last", "kept", "state"):
            same(getattr(compiled, name), getattr(alone, name), f"{name} after step {step}")
        for ours, theirs in zip(*given, strict=True):
            same(ours, theirs, f"arguments after step {step}")
    fresh = {"k": torch.randn(4, 4)}, ["start", 1, 2], Notes()
    before = str(vars(compiled))
    compiled.lower(x, *fresh).verify(x, *fresh)
    assert str(vars(compiled)) == before, "the proof puts back what it sets"


def note(module: nn.Module, args: Any, out: Tensor) -> None:
    global COUNT
    COUNT += 1
    SEEN.append(out.detach())


@pytest.mark.parametrize("where", ["", "fc"])
def test_a_hook_that_notes_something_does_so_in_every_call(where: str):
    global COUNT
    found = []
    for compile in (lambda m: shardc.compile(m, Plan(dp=Replicated()), mesh=Mesh(dp=2)), lambda m: m):
        torch.manual_seed(0)
        model = compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        model.get_submodule("0" if where else "").register_forward_hook(note)
        SEEN.clear()
        COUNT = 0
        for _ in range(3):
            model(torch.ones(2, 4))
        found.append((COUNT, list(SEEN)))
    assert found[0][0] == found[1][0] == 3
    same(found[0][1], found[1][1], "what the hook saw")


class Registers(Sets):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("late", x.sum())
        return x


class Foreign(Sets):
    def forward(self, x: Tensor) -> Tensor:
        self.kept["object"] = torch.Generator()
        return x


class Clocked(Sets):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(time.time())
        return x


class Backward(Sets):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.register_hook(lambda grad: SEEN.append(grad))
        return y


class Turns(Sets):
    """Reads in each call what the one before put there."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x + self.kept["last"] if "last" in self.kept else x)
        self.kept["last"] = x.detach()
        return x


@pytest.mark.parametrize(
    "make, says",
    [
        (Registers, "forward registers late"),
        (Foreign, "forward puts a Generator into kept['object']"),
        (Clocked, "sets SEEN"),
        (Backward, "a hook that runs in backward sets SEEN"),
        (Turns, "forward reads the tensor kept['last'] and sets it anew"),
    ],
)
def test_what_a_program_cannot_do_again_is_refused_by_name(make: type[Sets], says: str):
    SEEN.clear()
    compiled = shardc.compile(make(State), Plan(dp=Replicated()), mesh=Mesh(dp=2))
    with pytest.raises(ShardingError, match=re.escape(says)):
        for _ in range(3):
            compiled(torch.ones(2, 4))
    assert not SEEN


def same(ours: Any, theirs: Any, what: str) -> None:
    ours, theirs = (vars(v) if isinstance(v, SimpleNamespace | State | Notes) else v for v in (ours, theirs))
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), what
        for key in theirs:
            same(ours[key], theirs[key], f"{what}: {key}")
    elif isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, **USUAL, msg=lambda text: f"{what}: {text}")
        assert ours.requires_grad == theirs.requires_grad, what
    elif isinstance(theirs, list | deque):
        assert type(ours) is type(theirs) and len(ours) == len(theirs), what
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"{what}[{i}]")
    else:
        assert ours == theirs, what


class Instances(OrderedDict[str, Any]):
    """Stores classes, and gives an instance at each access."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class Scaled(list[float]):
    def __getitem__(self, at: Any) -> Any:
        return super().__getitem__(at) * 10


class Grows(defaultdict[str, list[float]]):
    pass


ACTIVATIONS = Instances(relu=nn.ReLU, tanh=nn.Tanh)


class Looks(nn.Module):
    """Reads containers whose classes compute what they give, of a Python module and its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.own, self.scales, self.grows = Instances(tanh=nn.Tanh), Scaled([0.1, 0.2]), Grows(list)
        self.grows["here"] = [2.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.own["tanh"](ACTIVATIONS["relu"](self.fc(x))) * self.scales[1]
        return y * self.grows["here"][0]


def test_containers_are_looked_at_as_they_are_stored():
    model = Looks()
    plain, x = copy.deepcopy(model), torch.randn(4, 4)
    compiled = shardc.compile(model, Replicated(), mesh=Mesh(dp=2))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x), **USUAL)
    assert len(compiled.programs) == 1
    kept = dict(OrderedDict.items(ACTIVATIONS)), dict(OrderedDict.items(model.own))
    assert all(OrderedDict.__getitem__(ACTIVATIONS, k) is v for k, v in dict(relu=nn.ReLU, tanh=nn.Tanh).items()), kept
    assert [*list.__iter__(model.scales)] == [0.1, 0.2] and [*model.grows] == ["here"]
    OrderedDict.__setitem__(model.own, "tanh", nn.ReLU)
    OrderedDict.__setitem__(plain.own, "tanh", nn.ReLU)
    torch.testing.assert_close(compiled(x), plain(x), **USUAL)
