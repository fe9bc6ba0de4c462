"""A trace with symbolic sizes is, at any sizes it admits, the trace that these sizes give."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.node import tensors
from shardc.compiler.trace.sizes.symbolic import Template
from shardc.compiler.trace.trace import trace


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.places = nn.Linear(8, 8), nn.Embedding(16, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, length, width = x.shape
        if length > 16:
            raise ValueError("too long")
        x = x + self.places(torch.arange(length))
        y = self.lin(x).view(rows, length, 2, width // 2).transpose(1, 2)
        scores = y @ y.transpose(-1, -2) * length**-0.5
        return (scores if mask is None else scores.masked_fill(mask, 0)).softmax(-1).mean((0, 1))


class Strided(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def numbers(node: Node) -> list[Any]:
    return [(tuple(t.shape), t.stride(), t.dtype, t.requires_grad) for t in tensors(node)]


CASES = {
    "attention": (Scores, [((4, 6, 8),), ((3, 16, 8),), ((2, 5, 8),)]),
    "two arguments": (Scores, [((4, 6, 8), (6, 6)), ((7, 9, 8), (9, 9))]),
    "convolution": (Strided, [((4, 2, 9, 12),), ((3, 2, 16, 7),)]),
}


def example(shapes: Any) -> tuple[Tensor, ...]:
    return tuple(torch.ones(s, dtype=torch.bool) if i else torch.randn(s) for i, s in enumerate(shapes))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_at_sizes_it_is_the_trace_of_these_sizes(name: str):
    make, calls = CASES[name]
    model = make()
    symbolic = trace(model, example(calls[0]), symbolic=True)
    template = Template.of(symbolic.gm, symbolic.signature)
    for shapes in calls:
        values = template.solve(shapes)
        assert values is not None and all(n >= 2 for n in values.values())
        ours, theirs = template.at(values).gm.graph, trace(model, example(shapes)).gm.graph
        assert str(ours) == str(theirs)
        for a, b in zip(ours.nodes, theirs.nodes, strict=True):
            assert numbers(a) == numbers(b), a


def test_branches_and_the_models_own_sizes_bound_it():
    symbolic = trace(Scores(), example([(4, 6, 8)]), symbolic=True)
    template = Template.of(symbolic.gm, symbolic.signature)
    assert len(template.symbols) == 2
    assert template.solve([(4, 17, 8)]) is None  # forward would raise
    assert template.solve([(4, 6, 9)]) is None  # the layer takes 8
    assert template.solve([(1, 6, 8)]) is None  # one row is broadcast
    assert template.solve([(9, 16, 8)]) is not None


def test_a_size_read_from_data_is_refused_as_ever():
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum()

    with pytest.raises(ShardingError):
        trace(Chosen(), (torch.randn(4, 3),), symbolic=True)
