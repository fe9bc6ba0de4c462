"""Every optimizing pass can be left out: the program is still right, and does without what the pass did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan, PlanError, Replicated
from shardc.passes.pipeline import OPTIONAL, PLAIN
from tests.acceptance.compare import compare, counts
from tests.acceptance.models import TRANSFORMER_TP, Transformer
from tests.runtime.ranks import on_ranks, run_ranks


class WithLoss(nn.Module):
    """Classes split over tp, so that the fused cross entropy has work."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(layers=1)
        self.head = nn.Linear(self.body(torch.zeros(1, 8, dtype=torch.long)).shape[-1], 16)

    def forward(self, ids: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(ids)).flatten(0, 1), y.flatten())


def program(*without: str) -> Any:
    torch.manual_seed(0)
    ids, y = torch.randint(16, (4, 8)), torch.randint(16, (4, 8))
    tp = {**{f"body.{name}": style for name, style in TRANSFORMER_TP.items()}, "head": ColwiseParallel()}
    plan = Plan(dp=FullyShard("body.layers.*"), tp=tp)
    return compare(WithLoss(), plan, Mesh(dp=2, tp=2), ids, y, prove=False, without=without)


def moves(found: Any) -> int:
    return sum(counts(found).values())


@pytest.fixture(scope="module")
def whole() -> Any:
    return program()


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_program_is_right_without_any_one_pass(name: str, whole: Any):
    less = program(name)
    ran = [record for record in less.records if record.name == name]
    assert bool(ran) == (name in PLAIN)
    assert any(record.name == name for record in whole.records)
    if name == "join-messages":
        assert moves(less) > moves(whole)
    if name == "overlap":
        assert not any(record.changes.get("started") for record in ran)
    if name == "regather-in-backward":  # what was gathered stays
        assert moves(less) < moves(whole)


def test_a_program_is_right_without_all_of_them():
    assert not {record.name for record in program(*OPTIONAL).records} & {*OPTIONAL} - {*PLAIN}


def averaged(rank: int, sharded: bool, *without: str) -> tuple[list[Tensor], dict[str, int]]:
    """Whole gradients on two ranks with rows of their own, and what was averaged."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    model = Transformer(layers=1)
    plan = Plan(dp=FullyShard("layers.*") if sharded else Replicated())
    compiled = shardc.compile(model, plan, mesh=mesh, without=without)
    compiled(torch.arange(16).view(4, 4)[2 * rank :][:2] % 8).sin().sum().backward()
    (changes,) = [record.changes for record in compiled.programs[-1].records if record.name == "average-gradients"]
    return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in compiled.parameters()], changes


@on_ranks
@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_the_same_to_the_bit_wherever_they_are_averaged(sharded: bool):
    (early, tangents), _ = run_ranks(averaged, 2, (sharded,))
    (late, gradients), _ = run_ranks(averaged, 2, (sharded, "average-gradients"))
    assert tangents == {"tangents": 1} and gradients == {"gradients": len(late)}
    assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))
    assert any(g.count_nonzero() for g in early)


@pytest.mark.parametrize("name", ["overlapp", "localize"])
def test_a_name_that_is_no_optional_pass_is_refused(name: str):
    with pytest.raises(PlanError, match="is no pass that can be left out"):
        shardc.compile(nn.Linear(2, 2), mesh=Mesh(tp=2), without=name)
