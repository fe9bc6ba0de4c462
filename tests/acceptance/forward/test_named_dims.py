"""Indices that count through the batch, as published poolers and masks have them: rows stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import Mesh, Plan, Replicated
from tests.acceptance.compare import compare


class Indexed(nn.Module):
    """What an index takes of every row, behind a product and before one."""

    def __init__(self, index: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.index = nn.Linear(6, 6), nn.Linear(6, 3), index

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # [rows, 5, 6], [rows, 5]
        return self.down(self.index(torch.tanh(self.up(x)), ids))


def last(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0]), ids.argmax(-1)]


def from_the_end(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(len(x)), -1 - ids.argmin(-1)]


def several(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(len(x))[:, None], ids.argsort(-1)[:, :2]]


def in_order(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(len(x))[:, None], torch.arange(5)[None, :]]


def masked(x: Tensor, ids: Tensor) -> Tensor:
    """As a decoder's mask is made: of the batch's own mask, by two indices that count."""
    rows, keys = torch.arange(len(x)), torch.arange(5) + 0
    mask = (ids > 2)[rows[:, None, None, None], keys[None, None, None, :]]
    return (x[:, None] * mask.transpose(-1, -2)).sum(1)


@pytest.mark.parametrize("index", [last, from_the_end, several, in_order, masked])
def test_rows_stay_where_they_are(index: Callable):
    torch.manual_seed(0)
    x, ids = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True), torch.randint(9, (4, 5))
    program = compare(Indexed(index).double(), Plan(dp=Replicated()), Mesh(dp=2), x, ids)
    assert {c.kind for c in program.collectives()} <= {"all_reduce"}  # of parameters' gradients


def test_an_index_out_of_range_raises_as_on_one_device():
    def beyond(x: Tensor, ids: Tensor) -> Tensor:
        return x[torch.arange(len(x)), ids[:, 0]]

    model = Indexed(beyond).double()
    x, ids = torch.randn(4, 5, 6, dtype=torch.float64), torch.full((4, 5), 5)
    with pytest.raises(IndexError):
        model(x, ids)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|out of range"):
        shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))(x, ids)
