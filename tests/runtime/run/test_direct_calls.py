"""What runtime/direct.py puts in an operator's place calls that operator, and no other."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardc.runtime.run.direct_calls import DIRECT, direct

aten = torch.ops.aten
X, POSITIVE, IDS = torch.randn(4, 6), torch.rand(4, 6) + 0.5, torch.tensor([1, 0, 2])
ARGS: dict[Any, list[tuple[Any, ...]]] = {
    aten.add.Tensor: [(X, X), (X, X[0])],
    aten.addmm.default: [(X[0], X @ X.T, X)],
    aten.amax.default: [(X, [1]), (X, [1], True)],
    aten.bmm.default: [(X.view(2, 2, 6), X.view(2, 6, 2))],
    aten.cat.default: [([X, X],), ([X, X], 1)],
    aten.div.Tensor: [(X, POSITIVE), (X, 2), (X, 2.5)],
    aten.embedding.default: [(X, IDS), (X, IDS, 1), (X, IDS, -1, False, False)],
    aten.eq.Tensor: [(X, X)],
    aten.expand.default: [(X[:, :1], [4, 6])],
    aten.mean.dim: [(X, [1]), (X, [0, 1], True)],
    aten.mm.default: [(X, X.T)],
    aten.mul.Tensor: [(X, X), (X, 2), (X, 0.5)],
    aten.native_layer_norm.default: [(X, [6], X[0], X[1], 1e-5)],
    aten.permute.default: [(X, [1, 0])],
    aten.pow.Tensor_Scalar: [(X, 2)],
    aten.reshape.default: [(X, [2, 12]), (X.T, [24])],
    aten.select.int: [(X, 0, 1)],
    aten.squeeze.dim: [(X[:1], 0)],
    aten.sub.Tensor: [(X, X)],
    aten.sum.dim_IntList: [(X, [0]), (X, [0, 1], True)],
    aten.transpose.int: [(X, 0, 1)],
    aten.unsqueeze.default: [(X, 1)],
    aten.where.self: [(X > 0, X, POSITIVE)],
    aten.gelu.default: [(X,)],
}


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append((func, [a for a in args if not isinstance(a, Tensor)], kwargs))
        return func(*args, **(kwargs or {}))


def called(fn: Any, args: tuple[Any, ...]) -> tuple[list[Any], Any]:
    with torch.no_grad(), Called() as mode:
        result = fn(*args)
    return mode.ops, result


@pytest.mark.parametrize("op", DIRECT, ids=str)
def test_the_same_operator_is_called(op):
    for args in ARGS.get(op, [(POSITIVE,)]):
        want, by_op = called(op, args)
        have, by_function = called(direct(op, args, {}), args)
        assert [o for o, *_ in have] == [o for o, *_ in want]
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (by_op, by_function)), strict=True):
            assert torch.equal(a, b) and a.dtype is b.dtype and a.stride() == b.stride()


def test_left_as_it_is_with_keywords_or_none():
    assert direct(aten.clone.default, (X,), {"memory_format": torch.contiguous_format}) is aten.clone.default
    assert direct(aten.native_layer_norm.default, (X, [6], None, None, 1e-5), {}) is aten.native_layer_norm.default
    assert direct(aten.arange.default, (3,), {}) is aten.arange.default
