"""What users write that torch's own tracing errors say nothing of: named, at their line, with what to write instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import shardc
from shardc import Mesh, PlanError, ShardingError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.cells = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)


class Backward(Base):
    def forward(self, x: Tensor) -> Tensor:
        loss = self.up(x).square().mean()
        loss.backward()
        return loss


class Normal(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(self.up(x), 1.0, validate_args=True).rsample()


class Bernoulli(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.distributions.Bernoulli(probs=self.up(x).sigmoid(), validate_args=True).log_prob(
            torch.ones_like(x)
        )


class Packed(Base):
    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0]


class Flex(Base):
    def forward(self, x: Tensor) -> Tensor:
        q = self.up(x)[:, None]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 3, 3, device="cpu")
        return flex_attention(q, q, q, block_mask=mask)  # pyright: ignore


class Sparse(Base):
    """Makes a sparse tensor in one of these ways, or holds one."""

    def __init__(self, how: Callable[[Tensor], Tensor] | None = None, held: str = "") -> None:
        super().__init__()
        self.how = how
        self.register_buffer("table", torch.eye(8).to_sparse() if held == "table" else None)
        self.plain = torch.eye(8).to_sparse_csr() if held == "plain" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y if self.how is None else y + self.how(y[0]).to_dense()


PLACES = torch.tensor([[0, 1], [1, 0]])
MAKES: list[Callable[[Tensor], Tensor]] = [
    lambda y: y.to_sparse(),
    lambda y: y.to_sparse_csr(),
    lambda y: y.to_mkldnn(),
    lambda y: torch.sparse.mm(torch.sparse_coo_tensor(PLACES, y[0, :2], (3, 3)), y),
    lambda y: torch.sparse_csr_tensor(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0]), y[0, :2], (3, 8)),
]
KINDS = {
    Backward: ("calls backward", "call backward() on what the compiled module returns"),
    Normal: ("a distribution looks at the values", "validate_args=False"),
    Bernoulli: ("a distribution looks at the values", "validate_args=False"),
    Packed: ("packs sequences", "pass padded sequences"),
    Flex: ("flex_attention", "scaled_dot_product_attention"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_mistake_is_named_with_what_to_write(kind: type[nn.Module]):
    what, help = KINDS[kind]
    with pytest.raises(ShardingError, match=what) as refused:
        shardc.compile(kind(), shardc.Replicated(), mesh=Mesh(dp=2))(torch.randn(2, 3, 8))
    assert help in refused.value.help and "test_known_errors.py" in refused.value.where


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_is_refused_where_it_is_made_held_or_given():
    modules = [Sparse(how) for how in MAKES] + [Sparse(held="table"), Sparse(held="plain"), Sparse()]
    for module in modules:
        compiled, x = shardc.compile(module, shardc.Replicated(), mesh=Mesh(dp=2)), torch.randn(2, 3, 8)
        with pytest.raises(ShardingError, match="(is|gives) a sparse") as refused:
            compiled(x.to_sparse() if module is modules[-1] else x)
        assert "test_known_errors.py" in refused.value.where and "use a dense one" in refused.value.help
    x = torch.randn(2, 3, 8)
    assert torch.equal(compiled(x), module.up(x))  # and goes on without it


@pytest.mark.parametrize("make", [nn.Embedding, lambda *sizes, **o: nn.EmbeddingBag(*sizes, mode="sum", **o)])
def test_a_sparse_gradient_is_a_dense_one_with_the_same_numbers(make: Callable[..., Any]):
    plain, ids = make(10, 4, sparse=True), torch.tensor([[1, 2], [2, 4]])
    compiled = shardc.compile(copy.deepcopy(plain), shardc.Replicated(), mesh=Mesh(dp=2))
    torch.testing.assert_close(compiled(ids), plain(ids))
    for model in (compiled, plain):
        model(ids).sum().backward()
    torch.testing.assert_close(compiled.weight.grad, plain.weight.grad.to_dense())


def test_what_is_to_be_written_runs():
    class Unchecked(Base):
        def forward(self, x: Tensor) -> Tensor:
            return torch.distributions.Normal(self.up(x), 1.0, validate_args=False).log_prob(x)

    model, x = Unchecked(), torch.randn(2, 3, 8)
    torch.testing.assert_close(shardc.compile(model, shardc.Replicated(), mesh=Mesh(dp=2))(x), model(x))


def test_an_error_of_the_users_in_such_a_call_stays_what_it_is():
    class Wrong(Base):
        def forward(self, x: Tensor) -> Tensor:
            return torch.distributions.Normal(self.up(x), torch.ones(7), validate_args=True).rsample()

    with pytest.raises(ShardingError, match="raises RuntimeError|size") as refused:
        shardc.compile(Wrong(), shardc.Replicated(), mesh=Mesh(dp=2))(torch.randn(2, 3, 8))
    assert "validate_args" not in refused.value.help


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


OPTIMIZERS = {
    "made already": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "is None": lambda model: None,
    "needs a closure": lambda model: torch.optim.LBFGS,
}


@pytest.mark.parametrize("said", OPTIMIZERS)
def test_an_optimizer_that_train_step_cannot_use_is_refused(said: str):
    model = nn.Linear(8, 8)
    with pytest.raises(PlanError, match=said) as refused:
        shardc.train_step(model, shardc.Replicated(), loss, OPTIMIZERS[said](model), mesh=Mesh(dp=2))
    assert "test_known_errors.py" in refused.value.where
