"""Operators of which torch has another form for tracing: what is traced is what runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardc
from shardc import Mesh

EDGES = (-0.7, -0.5, 0.0, 0.5, 0.7, float("nan"), float("inf"), -float("inf"))


class Shrinks(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(F, self.name)(x, 0.5)


@pytest.mark.filterwarnings("ignore:.*plan is empty")
@pytest.mark.parametrize("name", ["hardshrink", "softshrink"])
def test_a_nan_has_the_gradient_of_the_kernel(name: str):
    x, y = (torch.tensor(EDGES, requires_grad=True) for _ in range(2))
    tangent = torch.arange(1.0, 9.0)
    model = Shrinks(name)
    want = model(x)
    want.backward(tangent)
    have = shardc.compile(model, mesh=Mesh(tp=2))(y)
    have.backward(tangent)
    assert torch.equal(have.nan_to_num(7.5), want.nan_to_num(7.5))
    assert x.grad is not None and y.grad is not None
    assert torch.equal(y.grad.nan_to_num(7.5), x.grad.nan_to_num(7.5))
