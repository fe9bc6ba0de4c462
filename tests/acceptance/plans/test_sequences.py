"""Sequences split over ranks: causal attention on each rank's own queries, like on one device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from shardc import ContextParallel, FullyShard, Layout, Mesh, Plan, PlanError, Replicated
from tests.acceptance.compare import compare, counts

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SPLIT = {"inputs": Shard(1), "outputs": Shard(1)}


class Attention(nn.Module):
    """Causal attention, with fewer heads of keys and values than of queries where asked for."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 8 * groups), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(rows, length, 2, self.groups, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups < 4)
        return x + self.out(mixed.transpose(1, 2).reshape(rows, length, 16))


@pytest.mark.parametrize(("ranks", "length", "groups"), [(2, 31, 4), (3, 32, 2), (4, 33, 4), (4, 32, 1)])
def test_queries_stay_and_keys_and_values_are_gathered(ranks: int, length: int, groups: int):
    model, x = Attention(groups).double(), torch.randn(2, length, 16, dtype=torch.float64)
    plan = Plan(cp=Replicated())
    made = compare(model, plan, Mesh(cp=ranks), x, steps=2, close=EXACT, prove=False, **SPLIT)
    assert made.work().repeated == 1.0
    found = counts(made)
    assert found["all_gather", "cp", "forward"] == 2
    assert {kind for kind, _, phase in found if phase == "forward"} == {"all_gather"}


def test_no_rank_computes_blocks_that_its_queries_do_not_see():
    """Keys behind a rank's last query are cut off, forward and backward; what is counted is the rank with most."""
    made = compare(Attention(), Plan(cp=Replicated()), Mesh(cp=4), torch.randn(2, 32, 16), prove=False, **SPLIT)
    text = str(made)
    assert "stop(32@cp)" in text and "start(32@cp)+1" in text and "-stop(32@cp)+32" in text


def test_more_queries_than_keys_and_a_rank_without_queries():
    class Two(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            q, k = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k))
            return F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).flatten(2)

    for lengths in ((9, 5), (5, 9), (3, 3)):
        q, k = (torch.randn(2, n, 8, dtype=torch.float64) for n in lengths)
        compare(Two(), Plan(cp=Replicated()), Mesh(cp=4), q, k, close=EXACT, prove=False, **SPLIT)


class Model(nn.Module):
    """Tokens, a causal layer, and logits; the loss too where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(20, 16), Attention(2), nn.Linear(16, 20)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.layer(self.embed(tokens)))
        return logits if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("plan", "mesh"),
    [
        (Plan(cp=ContextParallel()), Mesh(cp=3)),
        (Plan(dp=FullyShard("layer"), cp=ContextParallel()), Mesh(dp=2, cp=2)),
    ],
    ids=["alone", "beside FSDP"],
)
def test_one_line_of_a_plan_splits_sequences(plan: Plan, mesh: Mesh):
    tokens = torch.randint(20, (4, 31 if mesh.names == ("cp",) else 32))
    made = compare(Model().double(), plan, mesh, tokens, close=EXACT, prove=False)
    text = str(made)
    assert "@cp, 20]" in text and made.work().repeated == 1.0
    labels = torch.where(torch.rand(tokens.shape) < 0.6, -100, tokens)
    labels[:, :16] = -100  # the first rank has none that counts but across the border
    compare(Model().double(), plan, mesh, tokens, labels, close=EXACT, prove=False)


def test_what_has_no_sequence_is_the_same_on_every_rank_or_needs_a_word():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = Attention(), nn.Linear(16, 8)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1)) * weight[:, None]

    x, weight = torch.randn(2, 32, 16).double(), torch.rand(2).double()
    with pytest.raises(PlanError) as caught:
        compare(Pooled().double(), Plan(cp=ContextParallel()), Mesh(cp=2), x, weight)
    assert "weight has 1 dims, and cp = ContextParallel splits dim 1" in str(caught.value)
    assert "inputs={'weight': Layout()}" in str(caught.value)
    compare(
        Pooled().double(), Plan(cp=ContextParallel()), Mesh(cp=2), x, weight, close=EXACT, prove=False,
        inputs={"weight": Layout()},
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"how": "ring"}, {"how": "heads"}, {"balance": True}, {"how": "no"}, {"dim": -1}])
def test_what_is_not_reached_is_refused(options: dict):
    with pytest.raises(PlanError, match=next(iter(options))):
        ContextParallel(**options)
