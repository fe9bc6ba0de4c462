"""Sizes and numbers that data decides: whole on every rank, and right, whatever the data turns out to be.

Real ranks: test_data_parallel.py.
"""

# ruff: noqa: E501  (what is printed is not wrapped)

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, PlanError, Replicated, ShardingError
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.spec.sizes import DataSize
from shardc.runtime.run.bind import bind_program
from shardc.runtime.run.compiled_stretches import Stretches
from tests.agree import agrees, draw, traces_no_more

DP = Plan(dp=Replicated())
EXPERTS = {"experts.*.0": ColwiseParallel(), "experts.*.2": RowwiseParallel()}
TARGET = torch.tensor([0, 3, 1, 0, 7, 2])


def masked(logits: Tensor, target: Tensor) -> Tensor:
    counts = target != 0
    return F.cross_entropy(logits[counts], target[counts])


class MaskedSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


class MaskedLoss(nn.Module):
    """Only some positions count, as in masked language models."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return masked(self.head(x), target)


class Kept(nn.Module):
    """Its result has as many rows as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.lin(x[x[:, 0] > 0]).tanh()
        return kept, kept.sum() + self.lin(x).sum()


class Experts(nn.Module):
    """Each row goes to the expert that a router names, by the places that nonzero finds."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == i).squeeze(-1)
            out = out.index_add(0, rows, expert(x[rows]) * scores[rows, i].unsqueeze(-1))
        return out + x


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x[x > 0], 0.5)


class Answers(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        count = (x > 0).sum().item()
        largest = x.max().item()
        return torch.equal(x, y), torch.allclose(x, y), count, largest, count > 3, {"n": count + 1}, x.sum()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept = x[x > 0]
        if kept.shape[0] > 3:
            return kept.sum()
        return x.sum()


class Constrained(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return shardc.constrain(x[x > 0], Layout(dp=Shard(0))).sum()


class DrawsSoMany(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand(int((x > 0).sum().item()))


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bincount(x)


class Pairs(nn.Module):
    """As many above zero as below, or there is no answer."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0] + x[x < 0]


def on_two(model: nn.Module, **options: Any) -> Any:
    return shardc.compile(model, DP, mesh=Mesh(dp=2), **options)


def test_x_of_a_mask_is_made_of_whole_operands_and_what_follows_is_whole():
    program = on_two(MaskedSum()).lower(torch.randn(4, 4, requires_grad=True))
    assert_expected_inline(
        str(program),
        """\
mesh dp=2
%x: f32[4@dp, 4] = input x
%tangent_0: f32[] = tangent of output 0
%start_all_gather: f32[4, 4] = shardc.start(%x, all_gather, 0, dp)  # overlap
%gt: b8[4@dp, 4] = aten.gt.Scalar(%x, 0)
%all_gather_1: b8[4, 4] = shardc.all_gather(%gt, 0, dp)  # lower-reshards
%all_gather: f32[4, 4] = shardc.wait(%start_all_gather)  # lower-reshards
%index: f32[u0] = aten.index.Tensor(%all_gather, [%all_gather_1])
%sym_size: int u0 = aten.sym_size.int(%index, 0)
%le: bool u0 <= 16 = le(%sym_size, 16)
%_assert_scalar: check = aten._assert_scalar(%le, what tensors hold makes other sizes than this program is for: u0 <= 16)
%sum_1: f32[] = aten.sum(%index)
%expand: f32[u0] = aten.expand(%tangent_0, [%sym_size])
%new_zeros: f32[4, 4] = aten.new_zeros(%expand, [4, 4], dtype=f32, layout=torch.strided, device=cpu)
%index_put: f32[4, 4] = aten.index_put(%new_zeros, [%all_gather_1], %expand, True)
%local_slice: f32[4@dp, 4] = shardc.local_slice(%index_put, 0, dp)  # lower-reshards
return (%sum_1, %local_slice)""",
    )
    assert_expected_inline(
        "\n".join(program.notes()),
        """\
aten.index.Tensor decides sizes or numbers by data: 1 calls run on whole operands
aten.index_put decides sizes or numbers by data: 1 calls run on whole operands""",
    )


def test_experts_are_those_of_one_device_and_no_pass_changes_sums_and_products_over_their_rows():
    """Of a weight's gradient: fuse-bias and shorten-views change no call that would then meet such a size unsaid."""
    torch.manual_seed(0)
    found = str(agrees(Experts().double(), [draw(7, 4)], Mesh(dp=3), DP))
    assert re.search(r"f64\[1, 8\] = aten.sum.dim_IntList\(%\w+, \[0\], True\)", found)
    assert re.search(r"f64\[8, 4\] = aten.mm\(", found)


def test_a_result_may_have_as_many_rows_as_data_says():
    agrees(Kept().double(), [draw(7, 4)], Mesh(dp=3), DP)


def test_a_mean_over_the_rows_that_count_is_that_of_the_whole_batch():
    program = agrees(MaskedLoss().double(), [draw(6, 4), TARGET], Mesh(dp=2), DP)
    assert "%_log_softmax_backward_data" in str(program)  # fuse-cross-entropy leaves such rows alone


def test_experts_may_be_split_and_sharded_and_recomputed():
    plan, options = Plan(dp=FullyShard("experts.*"), tp=EXPERTS), {"recompute": "experts.*"}
    program = agrees(Experts().double(), [draw(7, 4)], Mesh(dp=2, tp=2), plan, options)
    assert any(c.kind == "all_gather" and c.mesh_dim == "tp" for c in program.collectives())


def test_one_program_serves_any_data_also_where_nothing_or_a_single_row_is_left():
    torch.manual_seed(0)
    model = Kept().double()
    alone, compiled = copy.deepcopy(model), on_two(model)
    for count in (5, 0, 1, 7):
        x = -torch.ones(7, 4, dtype=torch.float64)
        x[:count] = 1
        ours, theirs = ([x.clone().requires_grad_()] for _ in range(2))
        for module, xs in ((compiled, ours), (alone, theirs)):
            xs += module(*xs)
            (xs[1].sum() + xs[2]).backward()
        assert ours[1].shape == (count, 6)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours[0].grad, theirs[0].grad)
        grads = [[p.grad for p in m.parameters()] for m in (compiled, alone)]
        torch.testing.assert_close(*grads)
    assert len(compiled.programs) == 1


def test_numbers_come_back_as_plain_numbers():
    compiled, x = on_two(Answers()), torch.randn(4, 4, dtype=torch.float64)
    for y in (x, x + 1e-9, x + 1):
        have, want = compiled(x, y)[:-1], Answers()(x, y)[:-1]
        assert have == want
        assert [type(n) for n in have] == [type(n) for n in want] == [bool, bool, int, float, bool, dict]


def test_a_whole_step_with_a_loss_over_the_rows_that_count():
    torch.manual_seed(0)
    model = nn.Linear(4, 8).double()
    alone, x = copy.deepcopy(model), torch.randn(6, 4, dtype=torch.float64)
    make = partial(torch.optim.SGD, lr=0.1)
    step = shardc.train_step(model, DP, lambda m, x, t: masked(m(x), t), make, mesh=Mesh(dp=2))
    optimizer = make(alone.parameters())
    for target in (TARGET, TARGET.flip(0), torch.tensor([0, 0, 0, 0, 0, 1])):
        loss = step(x, target)
        want = masked(alone(x), target)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        torch.testing.assert_close(loss, want)
    torch.testing.assert_close(list(model.parameters()), list(alone.parameters()))


@pytest.mark.parametrize("rng", ["counter", "replay"])
def test_dropout_of_as_many_rows_as_data_says(rng: str):
    model, x = Dropped().double(), draw(7, 4)
    alone, compiled = copy.deepcopy(model), on_two(model, rng=rng)
    torch.manual_seed(0)
    compiled(x).sum().backward()
    assert compiled.programs[-1].verify(x) < 1e-9
    if rng == "replay":
        found = []
        for module in (compiled, alone):
            torch.manual_seed(1)
            found.append(module(x))
        torch.testing.assert_close(*found)


def test_programs_are_saved_shown_and_counted(tmp_path: Path):
    x = torch.randn(6, 4)
    compiled, other = on_two(MaskedSum()), on_two(MaskedSum())
    value = compiled(x)
    compiled.save_programs(tmp_path / "programs")
    other.load_programs(tmp_path / "programs")
    traces_no_more(other)
    torch.testing.assert_close(other(x), value)
    assert str(other.programs[-1]) == str(compiled.programs[-1])
    compiled.programs[-1].view(tmp_path / "view.html")
    held = 3 * 4 * 4 + 6 * 4 * (4 + 1)  # half of x; all of x and of the mask
    assert compiled.programs[-1].peak_bytes() >= held + 6 * 4 * 4  # ... and as many elements as there can be


def test_bytes_without_a_bound_are_not_told_and_do_not_hinder_the_viewer(tmp_path: Path):
    compiled = on_two(Counts())
    assert torch.equal(compiled(torch.tensor([1, 4, 1, 1])), torch.tensor([0, 3, 0, 0, 1]))
    with pytest.raises(ShardingError) as error:
        compiled.programs[-1].peak_bytes()
    assert_expected_inline(
        _text(error.value),
        """\
sharding error: %bincount has a size that data decides without a bound, so nobody knows its bytes
  --> test_data_sizes.py:N in forward
   |   %all_gather: i64[4] = shardc.all_gather(%x, 0, dp)  # lower-reshards
   | > %bincount: i64[u0] = aten.bincount(%all_gather)
   = help: give the size as a Python number where there is one (num_classes= of one_hot)""",
    )
    compiled.programs[-1].view(tmp_path / "view.html")


def test_sizes_that_must_be_equal_are_compared_when_the_program_runs():
    compiled = on_two(Pairs())
    x = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert compiled(x).tolist() == [-1.0, -1.0]
    with pytest.raises(RuntimeError, match=r"makes other sizes than this program is for: Eq\(u0, u1\)"):
        compiled(x.abs())


def _text(error: Exception) -> str:
    return re.sub(r":\d+ in", ":N in", str(error))


def _refused(model: nn.Module, **options: Any) -> str:
    with pytest.raises((ShardingError, PlanError)) as error:
        on_two(model, **options)(torch.randn(4, 4))
    return _text(error.value)


def test_a_branch_on_what_data_decides_is_refused_at_its_line():
    assert_expected_inline(
        _refused(Branches()),
        """\
sharding error: forward depends on the value of a tensor, which is not known when tracing
  --> test_data_sizes.py:N in forward
   |           kept = x[x > 0]
   | >         if kept.shape[0] > 3:
   |               return kept.sum()
   = help: compute both sides and choose with torch.where, or move the branch out of forward; a size must be a Python number, not read from a tensor""",
    )


def test_a_layout_that_would_split_it_is_refused():
    assert_expected_inline(
        _refused(Constrained()),
        """\
plan error: the value given to constrain has shape [u0], of which data decides a size: it lies whole on every rank
  --> test_data_sizes.py:N in forward
   = help: give it no layout that splits it""",
    )
    assert_expected_inline(
        _refused(Kept(), outputs=(Layout(dp=Shard(0)), None)),
        """\
plan error: output output[0] has shape [u0, 6], of which data decides a size: it lies whole on every rank
  --> test_data_sizes.py:N in forward
   = help: give it no layout that splits it""",
    )


def test_strict_gathers_nothing_for_it():
    assert_expected_inline(
        _refused(MaskedSum(), strict=True),
        """\
sharding error: aten.index.Tensor decides a size or number by what tensors hold, so it needs them whole, and strict=True gathers nothing unasked
  --> test_data_sizes.py:N in forward
   |   %gt: b8[4@dp, 4] = aten.gt.Scalar(%x, 0)
   | > %index: f32[u0] = aten.index.Tensor(%x, [%gt])
   = help: make what it is given whole there (a style's layouts, or shardc.constrain)""",
    )


def test_draws_of_a_size_that_no_tensor_has_are_refused_unless_torch_draws_them():
    assert_expected_inline(
        _refused(DrawsSoMany()),
        """\
sharding error: aten.rand draws as many numbers as data says, and like no tensor
  --> test_data_sizes.py:N in forward
   = help: draw them like a tensor that has this size (torch.rand_like), or compile with rng="replay\"""",
    )
    assert on_two(DrawsSoMany(), rng="replay")(torch.ones(4, 4)).shape == (16,)


def test_a_pass_that_forgets_what_data_decides_is_named():
    program = on_two(MaskedSum()).lower(torch.randn(4, 4))
    node = next(n for n in program.gm.graph.nodes if n.name == "sum_1")
    del node.meta["data"]
    with pytest.raises(ShardingError, match="is made of what data decides the size of"):
        verify(program.gm, Stage.SCHEDULED, program.mesh)


def test_a_size_that_data_decides_is_equal_to_no_number():
    size = DataSize("u0", 16)
    assert size != 16 and size == DataSize("u0", None) and size != DataSize("u1", 16)
    assert (size + 1, f"{size}", copy.deepcopy(size).bounded) == (17, "u0", True)


def test_a_backend_is_not_given_what_has_such_a_size():
    program = shardc.compile(Kept(), DP, mesh=Mesh(dp=1)).lower(torch.randn(4, 4))
    mine = bind_program(program.halves.forward, program.mesh, {"dp": 0}, {})
    given: list[str] = []
    run = Stretches(lambda gm, _: given.append(gm.code) or gm.forward).compiled(mine)
    x = torch.tensor([[1.0] * 4, [-1.0] * 4, [2.0] * 4, [3.0] * 4])
    found = run(torch.ones(6, 4), torch.zeros(6), x)
    assert [tuple(t.shape) for t in found[:2]] == [(3, 6), ()]
    assert given and not any("index" in code for code in given)
