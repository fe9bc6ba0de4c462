"""Every optimizing pass can be left out: the program is still right, and does without what the pass did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan, PlanError
from shardc.passes.pipeline import OPTIONAL
from tests.acceptance.compare import compare, counts
from tests.acceptance.models import TRANSFORMER_TP, Transformer


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
    assert not ran if name != "overlap" else [r.changes.get("started", 0) for r in ran] == [0]
    assert any(record.name == name for record in whole.records)
    if name == "join-units":
        assert moves(less) > moves(whole)
    if name == "regather-in-backward":  # what was gathered stays
        assert moves(less) < moves(whole)


def test_a_program_is_right_without_all_of_them():
    assert not {record.name for record in program(*OPTIONAL).records} & {*OPTIONAL} - {"overlap"}


@pytest.mark.parametrize("name", ["overlapp", "localize"])
def test_a_name_that_is_no_optional_pass_is_refused(name: str):
    with pytest.raises(PlanError, match="is no pass that can be left out"):
        shardc.compile(nn.Linear(2, 2), mesh=Mesh(tp=2), without=name)
