"""What random programs, or a close look, once found wrong: each case cut down to what it takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, Replicated, ShardingError
from shardc.compiler.driver.kept_gradients import Sync
from shardc.compiler.rules.table import RuleError
from tests.acceptance.models import MLP
from tests.agree import agrees, draw, lowering_of

TWO = Mesh(tp=2)
ANY = {"": PrepareModuleInput()}  # a plan that says nothing, and so is not empty


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x))


def test_a_recomputed_batch_norm_reads_no_statistics_that_forward_has_changed():
    agrees(Normed().double(), [draw(6, 4)], Mesh(dp=2), Replicated(), {"recompute": "norm"})
    agrees(Normed().double(), [draw(6, 4)], TWO, {"norm.weight": Shard(0)}, {"recompute": ["*"]})


class NormsAColumn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unbind(1)[1])


@pytest.mark.parametrize("desired", [Shard(0), Replicate(), Shard(1)])
def test_a_marked_value_lies_in_memory_as_it_does_without_the_mark(desired: object):
    """A mark that packed it made tracing leave out the copy that group norm needs."""
    plan = {"norm": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=desired)}
    agrees(NormsAColumn().double(), [draw(2, 5, 2, 4)], TWO, plan)


class Entropy(nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target, ignore_index=0)


@pytest.mark.parametrize("split", [Shard(0), Shard(1), Replicate()])
def test_where_every_target_is_ignored_the_loss_is_nan_and_its_gradient_zero(split: object):
    x, target = draw(3, 8), torch.zeros(3, dtype=torch.int64)
    model = shardc.compile(Entropy(), ANY, mesh=TWO, inputs=(split, None))
    loss = model(x, target)
    loss.backward()
    assert math.isnan(loss.item())
    assert torch.equal(x.grad, torch.zeros_like(x))  # pyright: ignore


class TwoResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP()

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor, int]:
        y = self.net(x)
        return y, None, y.square().mean(), 3


@pytest.mark.parametrize("ignored", [None, "net.net1"])
def test_programs_average_once_and_are_proved_so(ignored: str | None):
    """A loss beside split results; and a loss alone, whose gradients nothing averages."""
    plan = Plan(dp=Replicated(ignored_modules=ignored))
    agrees(MLP().double(), [draw(6, 16)], Mesh(dp=2), Plan(dp=Replicated()))
    agrees(TwoResults().double(), [draw(6, 16)], Mesh(dp=2), plan)
    agrees(TwoResults().double(), [draw(6, 16)], Mesh(dp=2), plan, {"outputs": (Layout(), None, None, None)})


def test_a_parameter_ignored_over_one_mesh_dim_is_averaged_over_the_others():
    plan = Plan(dp=Replicated(), tp=Replicated(ignored_modules="net1"))
    for outputs in (Layout(dp=Shard(0)), Layout(dp=Shard(0), tp=Shard(1)), Layout()):
        agrees(MLP().double(), [draw(6, 16)], Mesh(dp=2, tp=2), plan, {"outputs": outputs})


class SplitsItself(nn.Module):
    """Its weight's gradient is split over dp by columns, not pending: every rank has other features of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(shardc.constrain(x, Shard(1)))


def test_what_is_kept_back_is_a_pending_sum_or_lies_as_its_parameter_does():
    compiled = shardc.compile(SplitsItself(), Replicated(), mesh=Mesh(dp=2), inputs=Replicate(), outputs=Replicate())
    program = lowering_of(compiled).lower((torch.randn(4, 6),), {}, Sync(("lin.weight",))).program
    (gradient,) = [n for n in program.halves.backward.graph.output_node().args[0] if n is not None]  # pyright: ignore
    assert str(gradient.meta["spec"]) in ("[4, 6]", "[4, 6]+dp")


def test_a_gradient_penalty_is_refused_and_not_left_out():
    """Gradients made with create_graph=True were constants, so that a penalty on them trained nothing."""
    compiled = shardc.compile(MLP().double(), {"net1": ColwiseParallel()}, mesh=TWO)
    x = draw(4, 16)
    (slope,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(ShardingError, match="differentiated once more"):
        (compiled(x).square().mean() + slope.norm()).backward()
    (plain,) = torch.autograd.grad(compiled(x).sum(), x)
    assert not plain.requires_grad and torch.equal(plain, slope.detach())


def test_a_module_may_return_none_beside_a_tensor():
    """As nn.MultiheadAttention does."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = draw(2, 3, 8)
    alone = copy.deepcopy(model)(x, x, x, need_weights=False)
    out, weights = shardc.compile(model, ColwiseParallel(), mesh=TWO)(x, x, x, need_weights=False)
    assert weights is None
    torch.testing.assert_close(out, alone[0])


@pytest.mark.parametrize("shape", [(5, 2), (5, 2, 3)])
def test_batch_norm_of_an_input_that_needs_no_gradient(shape: tuple[int, ...]):
    """Tracing shows a gradient of the input that the mask leaves out."""
    model, x = nn.BatchNorm1d(2).double(), torch.randn(shape, dtype=torch.float64)
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated(), mesh=Mesh(dp=2))
    compiled(x).square().sum().backward()
    alone(x).square().sum().backward()
    for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_rule_that_does_not_fit_is_an_error_at_the_users_line(monkeypatch: pytest.MonkeyPatch):
    def wrong(*_: object) -> None:
        raise RuleError("(('c',),) does not fit a tensor of 3 dims")

    monkeypatch.setattr("shardc.compiler.infer.decisions.rule_of", wrong)
    with pytest.raises(ShardingError, match=r"aten.mul.Tensor cannot be sharded(.|\n)*test_found.py:\d+ in forward"):
        shardc.compile(Doubled(), Plan(dp=Replicated()), mesh=Mesh(dp=2))(torch.randn(4, 4))


class Box:
    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


class ScaledByABox(nn.Module):
    def forward(self, x: Tensor, box: Box) -> Tensor:
        return x * box.scale


def test_an_object_that_holds_a_tensor_is_no_input():
    """It was taken as a constant: a tensor put into it later was not seen."""
    compiled = shardc.compile(ScaledByABox(), ANY, mesh=TWO)
    with pytest.raises(shardc.PlanError, match="an input of type Box is neither a tensor nor a value"):
        compiled(draw(4, 3), Box(draw(3)))


class HalfOfASum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x)
        return self.down(y).sum(0).chunk(2, 0)[0], y


def test_a_gradient_is_whole_over_one_mesh_dim_before_it_is_split_over_another():
    """Halves of the sum make torch's placement of down's weight over tp strided, which its gradient, still split over
    dp, did not take: a ValueError without a line."""
    styles = {"up": RowwiseParallel(input_layouts=Shard(-2)), "down": ColwiseParallel()}
    outputs = (Layout(dp=Shard(0), tp=Shard(0)), Layout(dp=Shard(0), tp=Replicate()))
    plan = Plan(dp=Replicated(), tp=styles)
    agrees(HalfOfASum().double(), [draw(2, 2)], Mesh(dp=2, tp=2), plan, {"inputs": (None,), "outputs": outputs})


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(9, 3, batch_first=True)
        self.conv = nn.Conv1d(2, 1, 1, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(x)
        return self.conv(y), self.mha(y, y, y)[0]


@pytest.mark.parametrize("kept", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("units", [("conv", "mha"), ("mha", "conv"), ("*", "*")])
def test_a_unit_that_two_mesh_dims_shard_and_a_third_splits_is_gathered_in_some_order(
    units: tuple[str, str], kept: tuple[bool, bool]
):
    """Of a parameter that is gathered over dp, put together anew and gathered over dp again both moved at once."""
    styles = {"mha": ColwiseParallel(), "conv.weight": Shard(-1), "conv.bias": Shard(0)}
    first, second = (FullyShard(unit, reshard_after_forward=free) for unit, free in zip(units, kept, strict=True))
    agrees(Attends().double(), [draw(2, 2, 9)], Mesh(dp=2, cp=2, tp=2), Plan(dp=styles, cp=first, tp=second))


class Puts(nn.Module):
    """What is put at an index nobody splits, beside a row that each rank would have to fetch over both mesh dims."""

    def forward(self, x: Tensor) -> Tensor:
        v1 = torch.tanh(x).clone().index_fill_(0, torch.tensor([0]), 0.5)
        v2 = v1 + v1
        v4 = v2.scatter(0, v2.argmax(0, keepdim=True), 0.0)
        return torch.add(v4.clone().mul_(2).add_(v4), x.narrow(0, 3, 1), alpha=2)


def test_a_factor_that_one_mesh_dim_may_split_is_not_split_by_two():
    agrees(Puts(), [draw(8, 2)], Mesh(dp=2, tp=2), Plan(dp=Replicated(), tp=Replicated()), {"inputs": (None,)})
