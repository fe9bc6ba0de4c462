"""The texts of errors, whole. EXPECTTEST_ACCEPT=1 rewrites the expectations."""

from __future__ import annotations

import pytest
from expecttest import assert_expected_inline

from shardc.compiler.errors import PlanError, RankFailure, RankMismatchError, ShardingError


def test_an_error_says_what_where_around_what_by_which_rule_and_what_to_do():
    error = ShardingError(
        "a pending sum over tp cannot pass aten.gelu",
        where="mlp.py:23 in forward (layers.0.mlp)",
        excerpt="  %mm: f32[32@dp, 256]+tp = aten.mm(%x, %w1)\n> %gelu = aten.gelu(%mm)",
        rule='aten.gelu "... -> ...", not linear',
        help="split dim 1 of layers.0.mlp.w1 instead",
    )
    assert_expected_inline(
        str(error),
        """\
sharding error: a pending sum over tp cannot pass aten.gelu
  --> mlp.py:23 in forward (layers.0.mlp)
   |   %mm: f32[32@dp, 256]+tp = aten.mm(%x, %w1)
   | > %gelu = aten.gelu(%mm)
   |   rule: aten.gelu "... -> ...", not linear
   = help: split dim 1 of layers.0.mlp.w1 instead""",
    )


def test_what_is_not_known_leaves_no_line():
    assert str(PlanError("no mesh dim pp")) == "plan error: no mesh dim pp"
    assert_expected_inline(
        str(PlanError("no mesh dim pp", help="mesh dims are dp, tp")),
        """\
plan error: no mesh dim pp
   = help: mesh dims are dp, tp""",
    )


def test_parts_can_be_asked_for():
    error = PlanError("what", where="here", excerpt="line", rule="rule", help="do")
    assert (error.what, error.where, error.excerpt, error.rule, error.help) == ("what", "here", "line", "rule", "do")


def test_a_place_is_added_once():
    error = ShardingError("what", help="do")
    assert str(error.at("a.py:1")) == "sharding error: what\n  --> a.py:1\n   = help: do"
    assert type(error.at("a.py:1")) is ShardingError
    assert error.at("a.py:1").at("b.py:2").where == "a.py:1"


@pytest.mark.parametrize("kind", [ShardingError, PlanError])
def test_mistakes_of_the_user_are_value_errors(kind: type[Exception]):
    assert issubclass(kind, ValueError)


@pytest.mark.parametrize("kind", [RankMismatchError, RankFailure])
def test_failures_of_ranks_are_runtime_errors(kind: type[Exception]):
    assert issubclass(kind, RuntimeError)
