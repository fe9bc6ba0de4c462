"""Functions of torch that look at a value, in the form that a program holds: what they compute and refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

import shardc
from shardc import Mesh, ShardingError
from tests.agree import Calls, agrees, draw

TWO = Mesh(tp=2)
pytestmark = pytest.mark.filterwarnings("ignore:.*plan is empty")


def _masked(x: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    x = x * 1
    x[mask] = v
    return x


def _masked_sum(x: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return x.index_put((mask,), v, accumulate=True)


def _ctc(x: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
    return F.ctc_loss(x.log_softmax(-1), targets, inputs, lengths, zero_infinity=True)


def _fitted(a: Tensor, b: Tensor) -> Tensor:
    few, many = torch.linalg.lstsq(a, b, driver="gels"), torch.linalg.lstsq(a.mT, b[:, :3, 0])
    return few.solution.sum((1, 2)) + few.residuals.sum(1) + many.solution.sum(1) * many.rank


MASK = torch.tensor([True, False, True, False])
TEXTS = (torch.tensor([[1, 2, 2], [3, 1, 0], [1, 1, 1]]), torch.tensor([6, 5, 3]), torch.tensor([3, 2, 3]))
LABELS = torch.tensor([[1, 2, -1, 0, 0], [-1, 0, 0, 0, 0], [4, 4, 0, -1, 3], [0, 3, 2, 4, 1]])
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "lstsq": (_fitted, (draw(4, 5, 3), draw(4, 5, 2))),
    "cov": (torch.cov, (draw(4, 6),)),
    "cov of one row": (torch.cov, (draw(6),)),
    "cov, weighted": (
        lambda x, f, a: torch.cov(x, correction=2, fweights=f, aweights=a),
        (draw(4, 4), torch.tensor([1, 0, 2, 3]), torch.rand(4, dtype=torch.float64)),
    ),
    "corrcoef": (torch.corrcoef, (draw(4, 6),)),
    "gaussian_nll_loss": (F.gaussian_nll_loss, (draw(4, 3), draw(4, 3), draw(4, 3).detach().abs().requires_grad_())),
    "gaussian_nll_loss, one variance a row": (
        lambda x, y, v: F.gaussian_nll_loss(x, y, v, full=True, eps=0.5, reduction="none"),
        (draw(4, 3), draw(4, 3), draw(4).detach().abs().requires_grad_()),
    ),
    "narrow": (lambda x, start: torch.narrow(x, 1, start, 2), (draw(4, 6), torch.tensor(3))),
    "narrow from the end": (lambda x, start: x.narrow(0, start, 2), (draw(4, 6), torch.tensor(-3))),
    "combinations": (torch.combinations, (draw(4),)),
    "combinations with replacement": (lambda x: torch.combinations(x, 3, True), (draw(4),)),
    "index_fill": (
        lambda x, i, v: x.index_fill(1, i, v),
        (draw(4, 6), torch.tensor([1, 1, 4]), draw()),
    ),
    "a mask set to as many rows": (_masked, (draw(4, 3), draw(2, 3), MASK)),
    "a mask set to one row": (_masked, (draw(4, 3), draw(3), MASK)),
    "a mask of all dims set": (_masked, (draw(4, 2), draw(4), torch.stack([MASK, ~MASK], 1))),
    "a mask that adds": (_masked_sum, (draw(4, 3), draw(2, 3), MASK)),
    "a mask that adds one row": (_masked_sum, (draw(4, 3), draw(1, 3), MASK)),
    "ctc_loss": (_ctc, (draw(6, 3, 5), *TEXTS)),
    "ctc_loss, texts end to end": (
        _ctc,
        (draw(6, 3, 5), torch.tensor([1, 2, 2, 3, 1, 1, 1, 1]), *TEXTS[1:]),
    ),
    "multi_margin_loss of one row": (
        lambda x, t: F.multi_margin_loss(x, t, reduction="none"),
        (draw(5), torch.tensor(2)),
    ),
    "multilabel_margin_loss, few labels": (F.multilabel_margin_loss, (draw(4, 5), LABELS)),
    "multilabel_margin_loss, each row": (
        lambda x, t: F.multilabel_margin_loss(x, t, reduction="none"),
        (draw(4, 5), LABELS),
    ),
    "multilabel_margin_loss of one row": (F.multilabel_margin_loss, (draw(5), LABELS[0])),
    "ctc_loss of one text": (_ctc, (draw(6, 5), TEXTS[0][0], TEXTS[1][0], TEXTS[2][0])),
}


@pytest.mark.parametrize("name", CASES)
def test_computes_what_torch_does(name: str):
    function, given = CASES[name]
    layouts = tuple(Shard(x.dim() - 1) if x.dim() else Replicate() for x in given)
    agrees(Calls(function), given, TWO, None, {"inputs": layouts})


def test_the_texts_of_a_batch_are_dealt_out():
    program = agrees(
        Calls(lambda x, *rest: F.ctc_loss(x, *rest, reduction="none")),
        (draw(6, 3, 5).detach().log_softmax(-1), *TEXTS), TWO, None,
        {"inputs": (Shard(1), Shard(0), Shard(0), Shard(0)), "outputs": Shard(0)},
    )  # fmt: skip
    assert program.collectives() == []


def test_the_matrices_of_a_batch_are_dealt_out():
    program = agrees(
        Calls(lambda a, b: torch.linalg.lstsq(a, b).solution), (draw(3, 4, 2), draw(3, 4, 1)), TWO, None,
        {"inputs": (Shard(0), Shard(0)), "outputs": Shard(0)},
    )  # fmt: skip
    assert program.collectives() == []


WRONG: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], type[Exception], str]] = {
    "a negative variance": (
        F.gaussian_nll_loss, (draw(4), draw(4), -torch.ones(4, dtype=torch.float64)), ValueError, "negative entry",
    ),
    "a negative weight": (
        lambda x, w: torch.cov(x, aweights=w), (draw(2, 4), torch.tensor([1.0, -1, 1, 1]).double()), RuntimeError,
        "aweights cannot be negative",
    ),
    "a label too large": (
        F.multilabel_margin_loss, (draw(1, 4), torch.tensor([[0, 4, -1, 0]])), RuntimeError, "out of range",
    ),
    "a start too far": (lambda x, s: x.narrow(0, s, 2), (draw(4), torch.tensor(3)), RuntimeError, "exceed"),
    "more places than values": (_masked, (draw(4), draw(2), ~MASK | MASK), RuntimeError, "shape mismatch"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_raises_where_torch_does(name: str):
    function, given, error, text = WRONG[name]
    with pytest.raises(error):
        function(*given)
    compiled = shardc.compile(Calls(function), mesh=TWO, inputs=tuple(Shard(0) if x.dim() else None for x in given))
    with pytest.raises(error, match=text):
        compiled(*given)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x * 2 if x.sum() > 0 else x
        except Exception:
            return x


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cov(x) * self.scale.item()


def _changes_the_view(x: Tensor, start: Tensor) -> Tensor:
    x = x * 1
    x.narrow(0, start, 2).mul_(2)
    return x


@pytest.mark.parametrize("module", [Branches(), Reads()], ids=["caught", "attribute"])
def test_what_needs_the_value_is_still_refused(module: nn.Module):
    with pytest.raises(ShardingError, match="value of a tensor"):
        shardc.compile(module, mesh=TWO)(draw(4, 4))


def test_a_view_at_a_place_that_a_tensor_says_cannot_be_written_to():
    with pytest.raises(ShardingError, match="narrow gave a view"):
        shardc.compile(Calls(_changes_the_view), mesh=TWO)(draw(4), torch.tensor(1))
