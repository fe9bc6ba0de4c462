"""What a program read while it was traced is part of what it is found by."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import Mesh, Plan, Replicated
from shardc.compiler.trace.module import reads
from tests.acceptance.compare import USUAL

FACTOR = 1.0


def doubled(x: Tensor) -> Tensor:
    return x * 2


class Config:
    def __init__(self) -> None:
        self.alpha, self.inner = 1.0, {"bias": [0.5, 1.5]}


class Reads(nn.Module):
    """Looks at one thing of each sort."""

    by_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.leaky = nn.Linear(4, 4), nn.Dropout(0.0), nn.LeakyReLU(0.1)
        self.scale, self.flag, self.count, self.unread = 1.0, True, 1, 0
        self.config, self.options, self.weights = Config(), {"gain": 1, "unread": 0}, [1.0, 2.0]
        self.chosen: Callable[[Tensor], Tensor] = torch.relu
        self.offset = torch.zeros(4)
        self.around = [self.made(1.0)]

    def made(self, factor: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x * factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaky(self.drop(self.fc(x))) * self.scale * self.by_class * FACTOR * self.options["gain"]
        for weight in self.weights:
            x = x + weight
        x = self.around[0](x) + self.config.inner["bias"][0] * self.config.alpha + self.offset
        if hasattr(self, "late"):
            x = x + 1
        return self.chosen(doubled(x)) if self.flag and self.count == 1 else x


def set_factor(value: float) -> None:
    global FACTOR
    FACTOR = value


def set_doubled(function: Callable[[Tensor], Tensor]) -> None:
    globals()["doubled"] = function


def plus_one(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + 1


def hooked(owner: nn.Module) -> Callable[[], None]:
    return owner.register_forward_hook(plus_one).remove


def put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; what sets it back, or takes it away."""
    before = vars(owner).get(name, owner)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is owner else setattr(owner, name, before)


def entry(table: Any, key: Any, value: Any) -> Callable[[], None]:
    before = table[key]
    table[key] = value
    return lambda: table.__setitem__(key, before)


def called(change: Callable[[Any], None], new: Any, old: Any) -> Callable[[], None]:
    change(new)
    return lambda: change(old)


def appended(items: list[Any], item: Any) -> Callable[[], None]:
    items.append(item)
    return lambda: items.remove(item)


READ: dict[str, Callable[[Reads], Callable[[], None]]] = {
    "a number": lambda m: put(m, "scale", 3.0),
    "a flag": lambda m: put(m, "flag", False),
    "a number of equal value and another type": lambda m: put(m, "scale", 1),
    "p of dropout": lambda m: put(m.drop, "p", 1.0),
    "a slope": lambda m: put(m.leaky, "negative_slope", 0.9),
    "an entry of a dict": lambda m: entry(m.options, "gain", 3),
    "an entry of a list": lambda m: entry(m.weights, 1, -3.0),
    "a list that grows": lambda m: appended(m.weights, 5.0),
    "an attribute of an object": lambda m: put(m.config, "alpha", 2.0),
    "an object in place of another": lambda m: put(m, "config", changed_config()),
    "an entry deep inside": lambda m: entry(m.config.inner["bias"], 0, 7.0),
    "a function": lambda m: put(m, "chosen", torch.tanh),
    "a closure in place of another": lambda m: entry(m.around, 0, m.made(4.0)),
    "a tensor in place of another": lambda m: put(m, "offset", torch.ones(4)),
    "an attribute that was not there": lambda m: put(m, "late", True),
    "an attribute of the class": lambda m: put(type(m), "by_class", 2.0),
    "an attribute over that of the class": lambda m: put(m, "by_class", 2.0),
    "a global": lambda m: called(set_factor, 2.0, 1.0),
    "a global function": lambda m: called(set_doubled, torch.neg, doubled),
    "a hook": lambda m: hooked(m.fc),
    "a hook of the root": lambda m: hooked(m),
    "a hook of all modules": lambda m: everywhere(),
    "forward of one module": lambda m: put(m.fc, "forward", torch.tanh),
    "forward of a class": lambda m: put(nn.LeakyReLU, "forward", lambda self, x: x * 3),
    "the default dtype": lambda m: called(torch.set_default_dtype, torch.float64, torch.float32),
}  # fmt: skip


def changed_config() -> Config:
    config = Config()
    config.alpha = 5.0
    return config


def halved(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
    return out / 2 if isinstance(module, nn.LeakyReLU) else None


def everywhere() -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(halved).remove


UNREAD: dict[str, Callable[[Reads], Callable[[], None]]] = {
    "an attribute": lambda m: put(m, "unread", 1),
    "a new attribute": lambda m: put(m, "epoch", 1),
    "an entry of a dict": lambda m: entry(m.options, "unread", 1),
    "an equal number": lambda m: put(m, "scale", float("1.0")),
    "an equal object": lambda m: put(m, "config", Config()),
    "an equal list": lambda m: put(m, "weights", [1.0, 2.0]),
}
"""A change to what was not read, or to what is equal, is not a change."""


@pytest.mark.slow
def test_what_was_read_and_changes_is_traced_anew_and_found_again():
    torch.manual_seed(0)
    model = Reads()
    alone, x = copy.deepcopy(model), torch.randn(4, 4)
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))
    assert_alike(compiled, alone, x, "as built")
    for number, (name, change) in enumerate(READ.items(), 2):
        undo = change(model), change(alone)
        assert_alike(compiled, alone, x, name)
        assert len(compiled.programs) == number, name
        for back in reversed(undo):
            back()
        assert_alike(compiled, alone, x, f"{name}, set back")
        assert len(compiled.programs) == number, name


def test_what_was_not_read_may_change():
    model, x = Reads(), torch.randn(4, 4)
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))
    compiled(x)
    for name, change in UNREAD.items():
        back = change(model)
        compiled(x)
        assert len(compiled.programs) == 1, name
        back()


def test_the_reason_of_another_program_is_logged(caplog: pytest.LogCaptureFixture):
    model, x = Reads(), torch.randn(4, 4)
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))
    compiled(x)
    model.drop.p, model.config.inner["bias"][0] = 0.5, 3.0
    with caplog.at_level(logging.INFO, "shardc"):
        compiled(x)
    assert "drop.p changed, config.inner.bias[0] changed" in caplog.text


def assert_alike(compiled: nn.Module, alone: nn.Module, x: Tensor, what: str) -> None:
    for m in (compiled, alone):
        m.zero_grad()
    ours, theirs = compiled(x), alone(x)
    assert ours.dtype == theirs.dtype, what
    torch.testing.assert_close(ours, theirs, **USUAL, msg=lambda text: f"{what}: {text}")
    if theirs.requires_grad:
        ours.sum().backward(), theirs.sum().backward()
        for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **USUAL, msg=lambda text: f"{what}: {text}")


class Registry(MutableMapping[str, Callable[[Tensor], Tensor]]):
    """Entries of the class, and of the object, which come first."""

    everywhere: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {"relu": torch.relu, "tanh": torch.tanh}

    def __init__(self) -> None:
        self.here: dict[str, Callable[[Tensor], Tensor]] = {}

    def __getitem__(self, key: str) -> Callable[[Tensor], Tensor]:
        return self.here[key] if key in self.here else self.everywhere[key]

    def __setitem__(self, key: str, value: Callable[[Tensor], Tensor]) -> None:
        self.here[key] = value

    def __delitem__(self, key: str) -> None:
        del self.here[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.everywhere, **self.here})

    def __len__(self) -> int:
        return len({*self.everywhere, *self.here})


CHOICES = Registry()


class Chooses(nn.Module):
    kind = "relu"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @property
    def chosen(self) -> str:
        return self.kind if hasattr(self, "kind") else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return CHOICES.get(self.chosen, torch.tanh)(self.fc(x))


def test_what_is_read_of_a_class_holds_from_call_to_call():
    model = Chooses()
    compiled, x = shardc.compile(model, Replicated(), mesh=Mesh(dp=2)), torch.randn(4, 4)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), torch.relu(model.fc(x)))
    assert len(compiled.programs) == 1
    compiled.programs[-1].verify(x)
    CHOICES["relu"] = torch.sigmoid
    torch.testing.assert_close(compiled(x), torch.sigmoid(model.fc(x)))
    del CHOICES["relu"]
    torch.testing.assert_close(compiled(x), torch.relu(model.fc(x)))


def test_a_class_is_the_same_at_each_look():
    """What it holds is looked at through a view that is made anew each time."""
    assert reads.Reads(lambda survey: survey.found.update(x=survey.describe(vars(Chooses), 1))).changed() == []
