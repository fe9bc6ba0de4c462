"""torch.func's transforms in forward, through modules that the plan names: equal to one device, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import Mesh, ShardingError
from tests.acceptance.compare import compare

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Transformed(nn.Module):
    """A transform of a small network with respect to its input."""

    def __init__(self, transform: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.transform = nn.Linear(4, 8), nn.Linear(8, 4), transform

    def inner(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self.inner, x)


def gradients_of_each(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: f(row).sum()))(x)


def mapped(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.vmap(f)(x)


def in_reverse(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.vjp(f, x)[1](torch.ones_like(x))[0]


@pytest.mark.parametrize("transform", [gradients_of_each, mapped, in_reverse])
def test_what_is_taken_in_reverse_equals_one_device(transform: Callable):
    compare(Transformed(transform).double(), PLAN, Mesh(tp=2), torch.randn(3, 4, dtype=torch.float64))


def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def constrained(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: shardc.constrain(x * 2, Replicate()), (x,), (torch.ones_like(x),))[1]


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jacfwd(f)(x)


@pytest.mark.parametrize("transform", [forward_mode, constrained, jacobian])
def test_what_is_taken_forward_is_refused_at_its_line(transform: Callable):
    compiled = shardc.compile(Transformed(transform), PLAN, mesh=Mesh(tp=2))
    with pytest.raises(ShardingError, match="a forward-mode derivative") as refused:
        compiled(torch.randn(3, 4))
    assert "test_transforms.py" in refused.value.where


def test_a_forward_derivative_that_passes_no_mark_is_right():
    model = Transformed(forward_mode).double()
    compare(model, None, Mesh(tp=1), torch.randn(3, 4, dtype=torch.float64))
