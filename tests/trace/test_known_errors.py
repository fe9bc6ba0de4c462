"""What users write that torch's own tracing errors say nothing of: named, at their line, with what to write instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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


KINDS = {
    Backward: ("calls backward", "call backward() on what the compiled module returns"),
    Normal: ("a distribution looks at the values", "validate_args=False"),
    Bernoulli: ("a distribution looks at the values", "validate_args=False"),
    Packed: ("packs sequences", "pass padded sequences"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_mistake_is_named_with_what_to_write(kind: type[nn.Module]):
    what, help = KINDS[kind]
    with pytest.raises(ShardingError, match=what) as refused:
        shardc.compile(kind(), shardc.Replicated(), mesh=Mesh(dp=2))(torch.randn(2, 3, 8))
    assert help in refused.value.help and "test_known_errors.py" in refused.value.where


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
