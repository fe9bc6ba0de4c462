"""Every rule in the table, proved on its operator; and rules that lie, each caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import shardc.compiler.rules.ops.all_rules  # noqa: F401
from shardc.compiler.infer.infer import decide
from shardc.compiler.rules.ops.index import _here
from shardc.compiler.rules.ops.slice import cut
from shardc.compiler.rules.table import TABLE, OpRule, parse, rule_of, tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from tests.rules.cases import shapes_and_products
from tests.rules.cases.all_cases import CASES
from tests.rules.operands import Case, real, whole
from tests.rules.prove import prove

aten = torch.ops.aten
# operators may warn of themselves: a beta interface, an argument soon to go
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _called(cases: list[Case]) -> list[Any]:
    return list(dict.fromkeys(op for op, _, _ in cases))


@pytest.mark.parametrize("op", _called(CASES), ids=str)
def test_holds(op: Any):
    calls = [(args, kwargs) for target, args, kwargs in CASES if target is op]
    failures = {i: found for i, call in enumerate(calls) if (found := prove(TABLE[op], op, *call))}
    assert not failures, "\n".join(f"{calls[i]}: {f}" for i, found in failures.items() for f in found)


def test_every_rule_has_a_case():
    ours = [op for op in TABLE if op.namespace in ("aten", "prims", "shardc")]
    assert [str(op) for op in ours if op not in _called(CASES)] == []


def test_every_pointwise_operator_has_a_rule():
    """Of those that make new tensors, as a traced graph has them."""
    known = {"aten.equal.default", "aten.rrelu.default"}  # a bool on the host; random, and decomposed
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::") and not s.is_mutable]
    names = [(s.name.removeprefix("aten::"), s.overload_name or "default") for s in schemas]
    ops = [getattr(getattr(aten, name, None), overload, None) for name, overload in names]
    pointwise = [op for op in ops if op is not None and torch.Tag.pointwise in op.tags]
    assert len(pointwise) > 200
    assert sorted({str(op) for op in pointwise if op not in TABLE} - known) == []


# -- rules that lie --------------------------------------------------------------------------------


def _every_second(site: Any) -> Any:
    return site.call(aten.slice.Tensor, site.args[0], 0, 0, 2**63 - 1, 2)


def _slice_at_the_global_start(site: Any) -> Any:
    return site.call(aten.slice.Tensor, site.args[0], 0, 4, 8)


def _gather_unmasked(site: Any) -> Any:
    at, _ = _here(site, site.args[2])
    return site.call(aten.gather.default, site.args[0], 1, at)


def _reshape(site: Any) -> Any:
    return site.call(aten.reshape.default, site.args[0], site.result_shape())


def _view_to_the_global_sizes(site: Any) -> Any:
    return site.call(aten.reshape.default, site.args[0], [4, 6])


def _counted_twice(site: Any) -> Any:
    return site.all_reduce(site.call(aten.mm.default, *site.args), "k")


def _deaf_rank(site: Any) -> Any:
    """A collective that only ranks with rows come to."""
    out = site.call(aten.mm.default, *site.args)
    return site.all_reduce(out, "k") if site.size("k") else out


A, B, C = real(3, 5), real(5, 7), real(3, 7)
LIES = {
    "a bias added by every rank": (aten.addmm.default, "n, m k, k n -> m n", {"sum": "k"}, (B[0], A, B)),
    "a contracted dim as a free one": (aten.mm.default, "m k, k n -> m n", {"max": "k"}, (A, B)),
    "relu of a pending sum": (aten.relu.default, "... -> ...", {"linear": "0"}, (A,)),
    "a sum into one operand of add": (aten.add.Tensor, "..., ... -> ...", {"linear": "0 | 1"}, (A, A * 2)),
    "a sum into both operands of mul": (aten.mul.Tensor, "..., ... -> ...", {"linear": "0 1"}, (A, A * 2)),
    "a sum into a divisor": (aten.div.Tensor, "..., ... -> ...", {"linear": "1"}, (A, A + 9)),
    "a sum into the input of a backward": (
        aten.gelu_backward.default,
        "..., ... -> ...",
        {"linear": "1"},
        (A, A),
    ),
    "a sum cast to integers": (
        aten._to_copy.default,
        "... -> ...",
        {"linear": "0"},
        (A,),
        {"dtype": torch.int64},
    ),
    "a sum plus a number": (aten.add.Scalar, "... -> ...", {"linear": "0"}, (A, 1.5)),
    "a sum into a mask's other side": (
        aten.where.self,
        "..., ..., ... -> ...",
        {"linear": "1"},
        (A > 0, A, A * 2),
    ),
    "factors swapped": (aten.permute.default, "a b -> a b", {}, (real(6, 6), [1, 0])),
    "factors of a dim in the wrong order": (
        aten.view.default,
        "a b -> (b a)",
        {"localize": _reshape},
        (real(4, 4), [16]),
    ),
    "a maximum joined as a sum": (aten.amax.default, "m n -> m", {"sum": "n"}, (A, [1])),
    "a maximum of sums": (aten.amax.default, "m n -> m", {"max": "n", "linear": "0"}, (A, [1])),
    "means of pieces added": (aten.mean.dim, "m n -> m", {"sum": "n"}, (A, [1])),
    "a softmax by pieces": (aten._softmax.default, "m n -> m n", {}, (A, 1, False)),
    "a scan by pieces": (aten.cumsum.default, "m n -> m n", {}, (A, 1)),
    "a flip by pieces": (aten.flip.default, "m n -> m n", {}, (A, [1])),
    "a triangle of each piece": (aten.tril.default, "m n -> m n", {"whole": "n"}, (real(7, 5),)),
    "sizes of a view not made local": (
        aten.view.default,
        "(a b) -> a b",
        {"localize": _view_to_the_global_sizes},
        (real(24), [4, 6]),
    ),
    "sizes of an expand not made local": (aten.expand.default, "1 n -> m n", {}, (A[:1], [7, 5])),
    "bounds of a slice not made local": (
        aten.slice.Tensor,
        "(c n) -> n",
        {"whole": "c", "localize": _slice_at_the_global_start},
        (real(12), 0, 4, 8),
    ),
    "every second row taken for a half": (
        aten.slice.Tensor,
        "(c n) -> n",
        {"whole": "c", "localize": _every_second},
        (real(12), 0, 0, 12, 2),
    ),
    "a squeeze that sees one row": (aten.squeeze.default, "a 1 b -> a b", {}, (real(2, 1, 3),)),
    "pieces of a cat end to end": (
        aten.cat.default,
        "n, n -> (n c)",
        {"whole": "c"},
        ([real(4), real(4) + 9],),
    ),
    "a lookup in rows not here": (
        aten.gather.default,
        "m v, m k -> m k",
        {"sum": "v", "plain": "v", "localize": _gather_unmasked},
        (A, 1, whole(5, 3, 2)),
    ),
    "a sum that is complete, called pending": (
        aten.mm.default,
        "m k, k n -> m n",
        {"sum": "k", "localize": _counted_twice},
        (A, B),
    ),
    "a collective that a rank skips": (
        aten.mm.default,
        "m k, k n -> m n",
        {"joined": "k", "localize": _deaf_rank},
        (A, B),
    ),
    "scatter_add into every rank's copy": (
        aten.scatter_add.default,
        "m v, m k, m k -> m v",
        {"sum": "k", "whole": "v"},
        (A, 1, whole(5, 3, 7), C),
    ),
    "groups split as channels": (
        aten.channel_shuffle.default,
        "b (g c) h w -> b (g c) h w",
        {"sizes": {"g": 2}},
        (real(2, 6, 5, 3), 2),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught(lie: str):
    op, text, options, args, *kwargs = LIES[lie]
    assert prove(lambda *a, **k: parse(text, **options), op, args, *kwargs)


def _passed(op: Any, args: Any, pending: set[int]) -> str:
    """The result's layout where some operands, all of one shape, are pending."""
    made = rule_of(op, args, {}, op(*args))
    assert made is not None
    mesh = Mesh(x=2)
    specs = [Spec.whole(t.shape) for t in args]
    specs = [s.with_pending({"x": "sum"}, mesh) if i in pending else s for i, s in enumerate(specs)]
    return str(decide(made, specs, [8 * t.numel() for t in args], mesh).results[0])


def test_add_passes_a_sum_that_both_operands_hold_and_mul_one_that_either_does():
    x = real(3, 5)
    assert _passed(aten.add.Tensor, (x, x), {0, 1}) == "[3, 5]+x"
    assert _passed(aten.add.Tensor, (x, x), {0}) == _passed(aten.add.Tensor, (x, x), {1}) == "[3, 5]"
    assert _passed(aten.mul.Tensor, (x, x), {0}) == _passed(aten.mul.Tensor, (x, x), {1}) == "[3, 5]+x"
    assert _passed(aten.neg.default, (x,), {0}) == "[3, 5]+x"
    assert _passed(aten.relu.default, (x,), {0}) == "[3, 5]"


def _has_localize(op: Any, args: Any, kwargs: Any) -> bool:
    made = TABLE[op](*args, **kwargs, results=tensors_in(op(*args, **kwargs)))
    return made.localize is not None or made.shape_arg is not None


def _bare(op: Any) -> Callable[..., OpRule]:
    return lambda *args, **kwargs: replace(TABLE[op](*args, **kwargs), localize=None, shape_arg=None)


def test_without_its_localize_function_a_rule_is_false():
    """So the cases reach what the function is there for."""
    ops = _called([c for c in shapes_and_products.CASES if _has_localize(*c)])
    held = [op for op in ops if not any(prove(_bare(op), op, a, k) for t, a, k in shapes_and_products.CASES if t is op)]
    assert held == [aten.as_strided.default]  # there it is about memory, which the pieces here have as it was


def test_as_strided_is_refused_where_memory_may_lie_otherwise():
    x = real(4, 6)
    for other in (x.t(), x[1:], x[:, :3]):
        assert "does not fit" in prove(TABLE[aten.as_strided.default], aten.as_strided.default, (other, [2], [1]))[0]


def test_a_line_that_does_not_fit_is_a_failure():
    def build(*args: Any, **kwargs: Any) -> OpRule:
        return parse("m k, k n -> m n", sum="k")

    assert prove(build, aten.mm.default, (A, B)) == []
    assert "the rule does not fit" in prove(build, aten.addmm.default, (C, A, B))[0]


def test_a_slice_is_read_in_its_widest_blocks():
    read = {bounds: (cut(*bounds).long, cut(*bounds).short) for bounds in [
        (12, 0, 12, 1), (12, 4, 8, 1), (12, 4, 12, 1), (12, 1, 12, 2), (12, 1, 4, 1), (1, 0, 1, 1),
        (12, 4, 4, 1),
    ]}  # fmt: skip
    assert list(read.values()) == [
        ("n", "n"), ("(c n)", "n"), ("(c n)", "(k n)"), ("(n c)", "n"), ("c", "k"), ("n", "n"), ("c", "k"),
    ]  # fmt: skip
