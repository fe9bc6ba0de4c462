"""What is so of an operator, asked of torch's own operators."""

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from shardc.compiler.rules.facts import computes, draws, is_cheap, is_thin, is_view, raises, written
from tests.rules.cases.all_cases import CASES

aten = torch.ops.aten


VIEWS = [
    (aten.view.default, [6]), (aten._unsafe_view.default, [6]), (aten.reshape.default, [3, 2]), (aten.t.default,),
    (aten.permute.default, [1, 0]), (aten.expand.default, [2, 3]), (aten.slice.Tensor, 0, 1, 2),
    (aten.select.int, 0, 1), (aten.split.Tensor, 1), (aten.unsafe_split.Tensor, 1), (aten.unbind.int,),
    (aten.alias.default,), (aten.detach.default,), (aten.conj_physical.default,), (aten.lift.default,),
]  # fmt: skip


def memory(results: Any) -> list[int]:
    flat = pytree.tree_leaves(results)
    return [y.untyped_storage()._cdata for y in flat if isinstance(y, torch.Tensor) and y.layout is torch.strided]


@pytest.mark.parametrize("op, rest", [(op, rest) for op, *rest in VIEWS])
def test_a_view_shows_its_operands_memory(op, rest):
    x = torch.arange(6.0).reshape(2, 3)
    assert is_view(op) and is_cheap(op) and not computes(op)
    assert memory(op(x, *rest))[0] == memory(x)[0]


def test_what_computes_has_memory_of_its_own():
    """Run on what every rule is proved on."""
    calls = [call for call in CASES if computes(call[0])]
    shown = [
        str(op) for op, args, kwargs in calls if not set(memory((args, kwargs))).isdisjoint(memory(op(*args, **kwargs)))
    ]
    assert not shown and len(calls) > 900


def test_only_what_repeats_elements_is_thin():
    assert is_thin(aten.expand.default) and not is_thin(aten.view.default)


def test_a_cast_is_cheap_and_no_view():
    assert is_cheap(aten._to_copy.default) and not is_view(aten._to_copy.default)
    assert not is_cheap(aten.mul.Tensor) and not is_view(torch.add)


def test_attention_draws_where_it_drops():
    attention, q = aten.scaled_dot_product_attention.default, torch.ones(1, 1, 2, 2)
    tagged = aten._scaled_dot_product_flash_attention.default
    assert draws(aten.rand_like.default, (q,), {}) and not draws(aten.add.Tensor, (q, q), {})
    for op in (attention, tagged):
        if torch.Tag.nondeterministic_seeded in op.tags:
            assert draws(op, (q, q, q), {"dropout_p": 0.5}) and not draws(op, (q, q, q), {"dropout_p": 0.0})


def test_checks_raise():
    assert raises(torch.ops.shardc.check_true.default) and raises(aten._assert_scalar.default)
    assert not raises(aten.div.Tensor)


def test_what_a_call_writes_to():
    x, y = torch.zeros(2), torch.ones(2)
    assert [value for _, value in written(aten.add_.Tensor, (x, y), {})] == [x]
    assert [value for _, value in written(aten.add.out, (y, y), {"out": x})] == [x]
    assert not list(written(aten.add.Tensor, (x, y), {}))
