"""Operators along the dim that is split: right, and nothing gathers their operand. Collectives are goldens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

import shardc
from shardc import Layout, Mesh, Program
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
    "min": (lambda x: x.min(1).values, [*ONCE, ("all_reduce", "backward", 15)]),  # whose indices only backward needs
    "cumsum": (lambda x: x.cumsum(1).detach() + x, ONCE),
    "cumsum, trained": (lambda x: x.cumsum(1), [*ONCE, *BACKWARDS]),
    "flip": (lambda x: x.flip(0, 1), FETCHED),
    "roll": (lambda x: x.roll((2, -4), (0, 1)), FETCHED),
    "cumprod": (lambda x: x.cumprod(1).detach() + x, ONCE),
    "logcumsumexp": (lambda x: x.logcumsumexp(1).detach() + x, ONCE),
    "cummax": (lambda x: torch.cat([*x.cummax(1)], 0)[:5].detach() + x, TWICE),
    "cummin": (lambda x: x.cummin(1).indices + x, TWICE),
    "kthvalue": (lambda x: x.kthvalue(12, 1, True).indices + x, [("all_reduce", "forward", 30)] * 2),
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


# -- images split by rows ----------------------------------------------------------------------------


class Rows(nn.Module):
    """Convolutions over rows that ranks share out, of an image as large as `constrain` finds it."""

    def __init__(self, strided: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, stride=1 + strided, dtype=torch.float64)
        self.second = nn.Conv2d(4, 4, (5, 1), padding=(2, 0), groups=2, dtype=torch.float64)
        self.third = nn.Conv2d(4, 2, 3, padding=2, dilation=2, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("strided", [False, True], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=3), Mesh(tp=4)], ids=str)
def test_convolutions_fetch_the_rows_around_their_own(mesh: Mesh, strided: bool):
    x = torch.randn(2, 3, 11, 6, dtype=torch.float64)
    rows = Layout(tp=Shard(2))
    program = compare(Rows(strided), {"first.weight": Replicate()}, mesh, x, inputs=rows, outputs=rows)
    kinds = [(kind, phase) for kind, phase, _ in moved(program)]
    assert set(kinds) == {("fetch", "forward"), ("fetch", "backward"), ("all_reduce", "backward")}
    assert (kinds.count(("fetch", "forward")), kinds.count(("fetch", "backward"))) == (3, 6)


class Seen(nn.Module):
    """Something that looks at windows of an image, whose channels are weighed first."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x * self.weight)


def _with_places(found: tuple[Tensor, Tensor]) -> Tensor:
    return found[0] + found[1]


KERNEL = torch.linspace(-1, 1, 4 * 2 * 9, dtype=torch.float64).view(4, 2, 3, 3)
CHANNELS = [("all_reduce", "backward", 4)]  # the weight's gradient
LOOKS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "maximum": (lambda x: F.max_pool2d(x, 3, 2, 1), ["forward", "backward", "backward"]),
    "maximum, where": (
        lambda x: _with_places(F.max_pool2d(x, 2, 1, 0, 2, return_indices=True)),
        ["forward", "backward", "backward"],
    ),
    "maximum of a volume": (lambda x: F.max_pool3d(x, 3, 1, 1), ["forward", "backward", "backward"]),
    "average": (lambda x: F.avg_pool2d(x, 3, 2, 1), ["forward", "backward"]),
    "average of what there is": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        ["forward", "backward"],
    ),
    "average of a volume": (lambda x: F.avg_pool3d(x, 2, 2, divisor_override=3), []),
    "windows side by side": (lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2), []),
    "as many as wanted": (lambda x: F.adaptive_avg_pool2d(x, (4, 2)), []),
    "transposed": (lambda x: F.conv_transpose2d(x, KERNEL, None, 2, 1, 1, 2), ["forward", "backward"]),
}


@pytest.mark.parametrize("name", LOOKS)
def test_windows_fetch_the_rows_around_their_own(name: str):
    """8 rows on 2 ranks: a fetch is of the rows around, and of none where windows end with the pieces."""
    fn, fetches = LOOKS[name]
    x, rows = torch.randn(2, 4, 8, 6, dtype=torch.float64), Layout(tp=Shard(2))
    program = compare(Seen(fn), {"weight": Replicate()}, Mesh(tp=2), x, inputs=rows, outputs=rows)
    assert [(kind, phase) for kind, phase, _ in moved(program) if kind == "fetch"] == [("fetch", f) for f in fetches]
    assert {m for m in moved(program) if m[0] != "fetch"} == set(CHANNELS)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_windows_over_few_rows(rows: int):
    def look(x: Tensor) -> Tensor:
        x = F.conv_transpose2d(x, KERNEL, None, 2, 1, 1, 2)
        return F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), (2, 1), 1, (1, 0), count_include_pad=False)

    x, split = torch.randn(2, 4, rows, 2, dtype=torch.float64), Layout(tp=Shard(2))
    program = compare(Seen(look), {"weight": Replicate()}, Mesh(tp=4), x, inputs=split, outputs=split)
    if rows > 1:  # a dim of one row is no dim to the product before
        assert {kind for kind, *_ in moved(program)} <= {"fetch", "all_reduce"}


def test_pieces_of_a_dim_cut_out_and_padded_are_fetched():
    def cut(x: Tensor) -> Tensor:
        return F.pad(x[:, 2:9] + x[:, 4:11] + x[:, 0:1], (3, 3)) * x[:, 5:6]

    x = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    program = compare(Along(cut), {"weight": Shard(0)}, Mesh(tp=3), x, inputs=Shard(1), outputs=Shard(1))
    assert {kind for kind, *_ in moved(program)} <= {"fetch", "all_reduce", "reduce_scatter"}, moved(program)


@pytest.mark.parametrize("seed", range(6))
def test_transposed_windows_of_any_stride_reach_and_added_rows(seed: int):
    """What is added to the result may hold windows of its own, which belong to no row of the input."""
    draw = random.Random(seed)
    for _ in range(4):
        kernel, stride, dilation = ([draw.randint(1, 4) for _ in "hw"] for _ in range(3))
        added = [draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
        padding = [draw.randint(0, (k - 1) * d) for k, d in zip(kernel, dilation, strict=True)]
        torch.manual_seed(seed)
        layer = nn.ConvTranspose2d(2, 4, kernel, stride, padding, added, groups=2, dilation=dilation).double()
        x = torch.randn(2, 2, draw.randint(2, 6), 4, dtype=torch.float64, requires_grad=True)
        try:
            want = layer(x)
        except RuntimeError:  # padded to nothing
            continue
        (expected,) = torch.autograd.grad(want.sin().sum(), x)
        split = Layout(tp=Shard(2))
        compiled = shardc.compile(layer, {"weight": Replicate()}, mesh=Mesh(tp=3), inputs=split, outputs=split)
        have = compiled(x)
        (gradient,) = torch.autograd.grad(have.sin().sum(), x)
        torch.testing.assert_close(have, want)
        torch.testing.assert_close(gradient, expected)
