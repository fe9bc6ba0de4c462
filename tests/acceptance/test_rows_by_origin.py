"""Rows that are sorted stay on the rank that they come from: routed experts in plain modules, against one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import Mesh, ShardingError
from shardc.compiler.ir.node import of
from shardc.compiler.pipeline.stages import Stage, verify
from tests.agree import agrees
from tests.build import all_gather, build

aten = torch.ops.aten

EXPERTS, TOP, WIDTH = 4, 2, 6


class Routed(nn.Module):
    """Each token goes to its best experts, sorted by expert, as transformers does it; products in float64."""

    def __init__(self, back: str = "put", bias: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, dtype=torch.float64)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 8, dtype=torch.float64) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH, dtype=torch.float64) / 3)
        self.shift = nn.Parameter(torch.randn(EXPERTS, 8, dtype=torch.float64))
        self.back = back
        with torch.no_grad():
            self.router.bias[0] += bias  # all to the first expert

    def forward(self, x: Tensor) -> Tensor:
        score, chosen = torch.topk(self.router(x).softmax(-1), TOP, dim=-1)
        key, perm = torch.sort(chosen.reshape(-1))
        rows = x[perm // TOP]
        hidden = torch.tanh(torch.bmm(rows.unsqueeze(1), self.up[key]).squeeze(1) + self.shift[key])
        out = torch.bmm(hidden.unsqueeze(1), self.down[key]).squeeze(1) * score.reshape(-1)[perm].unsqueeze(-1)
        if self.back == "add":
            return x + torch.zeros_like(x).index_add(0, perm // TOP, out)
        if self.back == "sort":
            inverse = torch.argsort(perm)
        else:
            inverse = torch.empty_like(perm)
            inverse[perm] = torch.arange(perm.numel())
        return x + out[inverse].view(-1, TOP, WIDTH).sum(1)


def rows(n: int = 12) -> Tensor:
    return torch.randn(n, WIDTH, dtype=torch.float64, requires_grad=True)


def gathers(program: Any) -> list[str]:
    return [c.kind for c in program.collectives() if c.kind not in ("all_reduce", "reduce_scatter")]


@pytest.mark.parametrize(("back", "ranks"), [("put", 2), ("put", 4), ("add", 4), ("sort", 2)])
def test_routed_experts_repeat_and_gather_nothing(back: str, ranks: int):
    program = agrees(Routed(back), [rows()], Mesh(dp=ranks), shardc.Plan(dp=shardc.Replicated()))
    assert program.work().repeated == 1.0
    assert gathers(program) == []


@pytest.mark.parametrize("n", [13, 5, 1])
def test_ranks_with_few_rows_or_none(n: int):
    agrees(Routed(), [rows(n)], Mesh(dp=4), shardc.Plan(dp=shardc.Replicated()))


def test_all_rows_to_one_expert():
    program = agrees(Routed(bias=50.0), [rows()], Mesh(dp=4), shardc.Plan(dp=shardc.Replicated()))
    assert gathers(program) == []


def test_beside_fully_sharded_weights():
    program = agrees(Routed(), [rows()], Mesh(dp=4), shardc.Plan(dp=shardc.FullyShard()))
    assert program.work().repeated == 1.0


class Grouped(nn.Module):
    """As transformers calls torch's grouped product: its groups end where counts, added up, say."""

    def __init__(self, product: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = nn.Linear(8, EXPERTS, dtype=dtype)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, 8, dtype=dtype) / 3)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        score, chosen = torch.topk(self.router(x).softmax(-1), TOP, dim=-1)
        key, perm = torch.sort(chosen.reshape(-1))
        counts = torch.histc(key.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        out = self.product(x[perm // TOP], self.up.transpose(-2, -1), offs=ends)
        out = out * score.reshape(-1)[perm].unsqueeze(-1)
        return out[torch.argsort(perm)].view(-1, TOP, 8).sum(1)


@pytest.mark.parametrize("n", [16, 5])
def test_a_grouped_product_takes_each_ranks_own_counts(n: int):
    pytest.importorskip("transformers.integrations.moe")
    product = torch.ops.transformers.grouped_mm_fallback
    x = torch.randn(n, 8, dtype=torch.float64, requires_grad=True)
    program = agrees(Grouped(product, torch.float64), [x], Mesh(dp=4), shardc.Plan(dp=shardc.Replicated()))
    assert program.work().repeated == 1.0
    assert gathers(program) == []


def test_torchs_own_grouped_product():
    model = Grouped(nn.functional.grouped_mm, torch.bfloat16)
    x = torch.randn(16, 8, dtype=torch.bfloat16)
    compiled = shardc.compile(model, shardc.Plan(dp=shardc.Replicated()), mesh=Mesh(dp=4))
    compiled(x).square().sum().backward()
    program = compiled.programs[-1]
    assert program.verify(x) < 0.1
    assert program.work().repeated == 1.0
    assert gathers(program) == []


# -- left alone: what may need the order of one device is sorted whole --------------------------------


class Left(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        value, perm = torch.sort(y)
        match self.what:
            case "returned":
                return value
            case "running sum":
                return value.cumsum(0).sum()
            case "first":
                return value[:3] * 2
            case "neighbours":
                return (value[1:] - value[:-1]).square().sum()
            case "place":
                return (perm * y).sum()
            case "half":
                return x[perm // 2].sum(-1) * y
            case "mixed":
                return (value * y).sum()
            case "softmax":
                return (value.softmax(0) * x[perm, 0]).sum()
            case "two orders":
                return (value * torch.sort(x[:, 0])[0]).sum()
            case "by place":
                return x[perm % 3].sum(-1) * y
            case "as mask":
                return x[perm.bool()].sum()
        raise AssertionError(self.what)


LEFT = "returned,running sum,first,neighbours,place,half,mixed,softmax,two orders,by place,as mask".split(",")


@pytest.mark.parametrize("what", LEFT)
def test_an_order_that_is_seen_is_that_of_one_device(what: str):
    agrees(Left(what), [rows()], Mesh(dp=4), shardc.Plan(dp=shardc.Replicated()))


def test_what_is_summed_needs_no_order():
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value, perm = torch.sort(x[:, 0])
            return (value * x[perm, 1]).exp().sum()

    agrees(Sums(), [rows()], Mesh(dp=4), shardc.Plan(dp=shardc.Replicated()))


def test_a_row_by_origin_is_never_moved():
    """A pass that gathered such rows would be named at once."""

    def gathered(x):
        return all_gather(aten.relu(x), 0, "dp")

    gm = build(gathered, Mesh(dp=2), Stage.RESHARDED, x="f32[8@dp, 4]")
    verify(gm, Stage.RESHARDED, Mesh(dp=2))
    of(next(iter(gm.graph.find_nodes(op="call_function", target=aten.relu.default)))).by_origin = True
    with pytest.raises(ShardingError, match="moves rows whose order is each rank's own"):
        verify(gm, Stage.RESHARDED, Mesh(dp=2))
