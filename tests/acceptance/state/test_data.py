"""`x.data = ...` and `x.set_(...)` in forward: what one device has afterwards, or refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import Mesh, Plan, Replicated, ShardingError


class Momentum(nn.Module):
    def __init__(self, assign: Callable[[Momentum, Tensor], None]) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("b", torch.zeros(4))
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        self.assign(self, x)
        return self.q(x) - self.k(x) + self.b


def teacher(m: Momentum, x: Tensor) -> None:
    for p, q in zip(m.k.parameters(), m.q.parameters(), strict=True):
        p.data = p.data * 0.9 + q.data * 0.1


def mean(m: Momentum, x: Tensor) -> None:
    m.b.data = x.mean(0).detach()


def mean_by_set(m: Momentum, x: Tensor) -> None:
    with torch.no_grad():
        m.b.set_(x.mean(0))


def with_the_old_at_hand(m: Momentum, x: Tensor) -> None:
    old = m.b.data
    m.b.data = old + x.mean(0).detach()
    m.b.data = m.b.data - old * 0.5


def decay(m: Momentum, x: Tensor) -> None:
    m.q.weight.data = m.q.weight.data * 0.9


@pytest.mark.parametrize("assign", [teacher, mean, mean_by_set, with_the_old_at_hand, decay])
def test_data_assigned_in_forward_is_written_back(assign: Callable[[Momentum, Tensor], None]):
    torch.manual_seed(0)
    model, x = Momentum(assign).double(), torch.randn(4, 4, dtype=torch.float64)
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))
    for _ in range(2):
        ours, theirs = compiled(x), alone(x)
        torch.testing.assert_close(ours, theirs)
        ours.sum().backward(), theirs.sum().backward()
        for (name, p), q in zip(compiled.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, msg=name)
    torch.testing.assert_close(compiled.q.weight.grad, alone.q.weight.grad)


def shares(m: Momentum, x: Tensor) -> None:
    m.k.weight.data = m.q.weight.data


def shrinks(m: Momentum, x: Tensor) -> None:
    m.b.data = m.b.data[:1].clone()


@pytest.mark.parametrize(
    "assign, says", [(shares, "k.weight lie in the memory of q.weight"), (shrinks, "in place of b")]
)
def test_data_that_no_write_can_stand_for_is_refused(assign: Callable[[Momentum, Tensor], None], says: str):
    compiled = shardc.compile(Momentum(assign), Plan(dp=Replicated()), mesh=Mesh(dp=2))
    with pytest.raises(ShardingError, match=says):
        compiled(torch.randn(4, 4))


def test_a_compiled_module_is_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=2))
    assert compiled is model and isinstance(compiled, nn.Sequential) and isinstance(compiled, shardc.CompiledModule)
    assert len(compiled) == 2 and compiled[0] is model[0]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    x = torch.randn(4, 4)
    first = model(x)
    copied = pickle.loads(pickle.dumps(compiled))
    assert copied is not model and isinstance(copied, shardc.CompiledModule) and not copied.programs
    torch.testing.assert_close(copied(x), first)
    assert len(copied.programs) == len(compiled.programs) == 1
