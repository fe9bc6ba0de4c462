"""Each program says why it was made, and what makes one again and again is warned of once."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import Mesh, Plan, Replicated


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor, step: int = 0, *, more: dict[str, float] | None = None) -> Tensor:
        return self.up(x) * min(1.0, step / 100) + (more or {}).get("bias", 0.0)


class Counting(Scaled):
    def forward(self, x: Tensor, step: int = 0, *, more: dict[str, float] | None = None) -> Tensor:
        self.calls += 1
        return self.up(x) * self.calls


X = torch.ones(2, 8)


def compiled(model: nn.Module | None = None, **options):
    return shardc.compile(model or Scaled(), Plan(dp=Replicated()), mesh=Mesh(dp=2), **options)


CALLS = {
    "argument step was 1, is 2": lambda c: c(X, 2),
    "input x was f32[2, 8] on cpu, is f32[4, 8] on cpu": lambda c: c(torch.ones(4, 8), 1),
    "input x was f32[2, 8] on cpu, is f64[2, 8] on cpu": lambda c: c.double()(X.double(), 1),
    "train() or eval() is another": lambda c: c.eval()(X, 1),
    "grad mode or autocast is another": lambda c: torch.no_grad()(c)(X, 1),
    "what is passed is another": lambda c: c(X, 1, more={"bias": 1.0}),
    "input x was f32[2, 8] on cpu, is f32[2, 8] on cpu, requires_grad": lambda c: c(X.clone().requires_grad_(), 1),
}


@pytest.mark.parametrize("reason", CALLS)
def test_a_program_says_what_was_another(reason: str, caplog: pytest.LogCaptureFixture):
    model = compiled()
    with caplog.at_level(logging.INFO, "shardc"):
        model(X, 1)
        CALLS[reason](model)
    first, second = (r.message for r in caplog.records if r.message.startswith("program "))
    assert first.startswith("program 1, ") and ":" not in first
    assert reason in second and second.startswith("program 2, ")


def test_the_nearest_call_is_the_one_compared_with(caplog: pytest.LogCaptureFixture):
    model = compiled()
    model(X, 1)
    model(torch.ones(4, 8), 2)
    with caplog.at_level(logging.INFO, "shardc"):
        model(torch.ones(4, 8), 3)
    assert "s: argument step was 2, is 3" in caplog.text


@pytest.mark.parametrize("model", [Scaled, Counting])
def test_a_number_that_makes_a_program_a_call_is_warned_of_once(model: type[nn.Module]):
    made = compiled(model())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(12):
            made(X, step)
    told = [str(w.message) for w in said if "has made 8 programs" in str(w.message)]
    assert len(told) == 1
    assert "argument step" in told[0] or "calls" in told[0]


def test_calls_that_alternate_between_few_programs_are_not_warned_of():
    made = compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20):
            made(X, step % 3)
    assert len(made.programs) == 3
