"""Operators along the dim that is split: right, and nothing gathers their operand. Collectives are goldens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from shardc import Mesh, Program
from tests.acceptance.compare import compare


class Along(nn.Module):
    """One operator along the last dim, which the weight's layout splits."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(torch.linspace(-1, 1, COLUMNS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x * self.weight)


ROWS, COLUMNS = 5, 13
# What each moves: (kind, phase, elements). One number for each of the 5 rows and each of the 3 ranks is 15; the
# all-reduces of 5 are sums over the columns.
ONCE, TWICE = [("all_reduce", "forward", 15)], [("all_reduce", "forward", 15)] * 2
FETCHED = [("fetch", phase, 65) for phase in ("forward", "backward")]
BACKWARDS = [("fetch", "backward", 65), ("all_reduce", "backward", 15), ("fetch", "backward", 65)]
SUM = [("all_reduce", "forward", 5)]
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[str, str, int]]]] = {
    "argmax": (lambda x: x.argmax(1, keepdim=True) + x, TWICE),
    "argmin": (lambda x: x.argmin(1) + x.sum(1), TWICE + SUM),
    "argmax of all": (lambda x: x.argmax() + x.sum(1), TWICE + SUM),
    "max": (lambda x: torch.cat([*x.max(1)]), TWICE),
    "min": (lambda x: x.min(1).values, TWICE),
    "cumsum": (lambda x: x.cumsum(1).detach() + x, ONCE),
    "cumsum, trained": (lambda x: x.cumsum(1), [*ONCE, *BACKWARDS]),
    "flip": (lambda x: x.flip(0, 1), FETCHED),
    "roll": (lambda x: x.roll((2, -4), (0, 1)), FETCHED),
    "cumprod": (lambda x: x.cumprod(1).detach() + x, ONCE),
    "logcumsumexp": (lambda x: x.logcumsumexp(1).detach() + x, ONCE),
    "topk": (lambda x: x.topk(3, 1).values, [("all_reduce", "forward", 45)] * 2),
    "smallest": (lambda x: x.topk(2, 1, largest=False).indices.sum() + x, [("all_reduce", "forward", 30)] * 2),
}


def moved(program: Program) -> list[tuple[str, str, int]]:
    return [(c.kind, c.phase, c.numel) for c in program.collectives()]


@pytest.mark.parametrize("name", MOVES)
def test_nothing_gathers_the_operand(name: str):
    torch.manual_seed(0)
    fn, moves = MOVES[name]
    x = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    outputs = Shard(1) if fn(x).shape == x.shape else Replicate()
    program = compare(Along(fn), {"weight": Shard(0)}, Mesh(tp=3), x, inputs=Shard(1), outputs=outputs)
    assert moved(program) == moves
