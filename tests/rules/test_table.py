"""The notation of rules: what a line means, how it fits shapes, and the text of each complaint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shardc.compiler.rules.table import (
    TABLE,
    OpRule,
    RuleError,
    fit,
    overload,
    parse,
    rule,
    rule_of,
    tensors_in,
)

aten = torch.ops.aten


def test_a_line_names_the_dims_of_operands_and_results():
    made = parse("m k, k n -> m n", sum="k", linear="0 | 1")
    assert made.operands == ((("m",), ("k",)), (("k",), ("n",)))
    assert made.results == ((("m",), ("n",)),)
    assert made.reductions == (("k", "sum"),)
    assert made.linear == (frozenset({0}), frozenset({1}))
    assert made.factors() == ("m", "k", "n")


def test_compound_dims_ones_and_tensors_without_dims():
    assert parse("(a b) 1 -> a b").operands == ((("a", "b"), ()),)
    assert parse("_, a -> a").operands == ((), (("a",),))
    assert parse("k, k -> _", sum="k").results == ((),)
    assert parse("-> a b").operands == ()


def test_linear_groups_are_of_operands_that_must_be_pending_together():
    assert parse("..., ... -> ...", linear="0 1").linear == (frozenset({0, 1}),)
    assert parse("a, a, a -> a", linear="0 1 | 0 2").linear == (frozenset({0, 1}), frozenset({0, 2}))
    assert parse("... -> ...").linear == ()


def test_dots_are_the_leading_dims_aligned_from_the_right():
    fitted = fit(parse("..., ... n, n -> ... n"), [(3, 5), (2, 3, 5, 7), (7,)], [(2, 3, 5, 7)])
    assert fitted.operands[0] == ((".-2",), (".-1",))
    assert fitted.operands[1] == ((".-3",), (".-2",), (".-1",), ("n",))
    assert dict(fitted.sizes) == {".-3": 2, ".-2": 3, ".-1": 5, "n": 7}


def test_dots_may_stand_for_no_dims():
    assert fit(parse("... -> ..."), [()], [()]).operands == ((),)
    assert fit(parse("... n -> ... n"), [(7,)], [(7,)]).operands == ((("n",),),)


def test_a_star_repeats_the_operand_before_it():
    fitted = fit(parse("a n, * -> a n"), [(2, 3)] * 3, [(2, 3)])
    assert fitted.operands == ((("a",), ("n",)),) * 3


def test_the_size_of_one_factor_of_a_dim_follows_from_the_others():
    fitted = fit(parse("(a b) c -> a (b c)"), [(6, 5)], [(2, 15)])
    assert dict(fitted.sizes) == {"a": 2, "b": 3, "c": 5}
    assert fitted.size("b") == 3


def test_sizes_may_be_said_where_shapes_leave_them_open():
    fitted = fit(parse("(c n) -> (k n)", whole="c k", sizes={"n": 4, "c": 3, "k": 2}), [(12,)], [(8,)])
    assert dict(fitted.sizes) == {"n": 4, "c": 3, "k": 2}
    with pytest.raises(RuleError, match=r"\('c', 'n'\) has size 12"):
        fit(parse("(c n) -> (k n)", whole="c k"), [(12,)], [(8,)])


COMPLAINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no arrow": (lambda: parse("m k, k n"), "'m k, k n': a rule reads 'operands -> results'"),
    "a factor is lost": (
        lambda: parse("m k, k n -> m n"),
        "'m k, k n -> m n': factors ['k'] vanish; name them in sum=, max=, ... or whole=",
    ),
    "a factor is lost from one of two results": (
        lambda: parse("m n -> m n, m"),
        "'m n -> m n, m': factors ['n'] vanish; name them in sum=, max=, ... or whole=",
    ),
    "an option names no factor": (
        lambda: parse("m n -> m n", whole="k"),
        "'m n -> m n': ['k'] named in an option but in no operand or result",
    ),
    "a plain factor that is nowhere": (
        lambda: parse("m n -> m n", plain="v"),
        "'m n -> m n': ['v'] named in an option but in no operand or result",
    ),
    "too few tensors": (
        lambda: fit(parse("a, a -> a"), [(3,)], [(3,)]),
        "'a, a -> a': the rule has 2 operands, the call 1 tensors",
    ),
    "another rank": (
        lambda: fit(parse("a b -> a b"), [(3,)], [(3,)]),
        "(('a',), ('b',)) does not fit a tensor of 1 dims",
    ),
    "equal names of unequal dims": (
        lambda: fit(parse("m k, k n -> m n", sum="k"), [(2, 3), (4, 5)], [(2, 5)]),
        "'m k, k n -> m n': dim ('k',) has size 4, but its factors have {'m': 2, 'k': 3}",
    ),
    "a one that is not of size one": (
        lambda: fit(parse("1 a -> a"), [(2, 3)], [(3,)]),
        "'1 a -> a': dim () has size 2, but its factors have {}",
    ),
    "factors that do not divide": (
        lambda: fit(parse("(a b) -> a b"), [(7,)], [(2, 3)]),
        "'(a b) -> a b': dim ('a', 'b') has size 7, but its factors have {'a': 2, 'b': 3}",
    ),
}


@pytest.mark.parametrize("fault", COMPLAINTS)
def test_a_complaint_says_what_is_wrong(fault: str):
    make, text = COMPLAINTS[fault]
    with pytest.raises(RuleError) as caught:
        make()
    assert str(caught.value) == text


@pytest.fixture
def table() -> Iterator[None]:
    """The table, as it was again after the test."""
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


@pytest.mark.usefixtures("table")
def test_a_line_registers_an_operator():
    rule(aten.mm.default, "m k, k n -> m n", sum="k")
    a, b = torch.empty(2, 3), torch.empty(3, 5)
    made = rule_of(aten.mm.default, (a, b), {}, torch.empty(2, 5))
    assert made is not None and dict(made.sizes) == {"m": 2, "k": 3, "n": 5}


@pytest.mark.usefixtures("table")
def test_a_function_registers_an_operator_and_sees_its_arguments():
    seen = []

    @rule(aten.permute.default)
    def _(x: Any, order: Any, *, results: Any) -> OpRule:
        seen.append((order, [tuple(t.shape) for t in results]))
        return parse("a b -> b a")

    made = rule_of(aten.permute.default, (torch.empty(2, 3), [1, 0]), {}, torch.empty(3, 2))
    assert made is not None and made.text == "a b -> b a"
    assert seen == [([1, 0], [(3, 2)])]


def test_an_operator_without_a_rule_has_none():
    assert rule_of(aten.nonzero.default, (torch.empty(3),), {}, torch.empty(3, 1)) is None


def test_operators_may_be_given_in_every_spelling():
    assert overload(aten.mm) is overload("aten::mm") is overload(aten.mm.default) is aten.mm.default


def test_tensor_operands_are_the_tensor_leaves_in_order():
    a, b, c = torch.empty(1), torch.empty(2), torch.empty(3)
    found = tensors_in([a, [None, b]], {"dim": 1, "weight": c})
    assert [t.numel() for t in found] == [1, 2, 3]
