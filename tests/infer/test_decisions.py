"""What a lowering keeps of its decisions changes none of them: equal calls are decided once, others apart."""

from __future__ import annotations

import warnings
from random import Random
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.decide import decide
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.infer import decisions, infer
from shardc.compiler.infer.decisions import Decisions, call_rule, decide_node
from shardc.compiler.ir.graph import call_nodes, copy_graph
from shardc.compiler.ir.node import nbytes, operands, spec
from shardc.compiler.ir.signature import Traced
from shardc.compiler.pipeline.runner import Context
from shardc.compiler.plan.resolve import resolve
from shardc.compiler.rules.table import TABLE
from shardc.compiler.rules.table import parse as rule_line
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.trace.trace import trace
from tests.build import build, parse
from tests.draw_plans import ask
from tests.draws import program

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=4)


class Forgetful(Decisions):
    """Decides every call by itself."""

    def rule(self, node):
        return decisions._rule(node)

    def decide(self, rule, node, specs, mesh, put_off):
        return infer.decide(rule, specs, [nbytes(n) for n in operands(node)], mesh, put_off)


def outcome(traced: Traced, model: nn.Module, asked: tuple, kept: Decisions) -> list[str]:
    """The program's text after every pass and what each call needs, or why there is none."""
    mesh, plan, options = asked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            borders = {side: options.get(side) for side in ("inputs", "outputs")}
            ctx = Context(mesh, resolve(plan, model, mesh, **borders), traced.signature, decisions=kept)
            made = decide(Traced(copy_graph(traced.gm), traced.signature), ctx)
        except (PlanError, ShardingError) as error:
            return [str(error)]
    return [r.after for r in made.records] + [str(n.meta.get("wants")) for n in made.global_gm.graph.nodes]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_program_is_the_same_when_each_call_is_decided_by_itself(seed: int):
    random = Random(seed)
    drawn = program(random)
    asked, model = ask(random, drawn).values(), drawn.model()
    traced = trace(model, drawn.tensors(), marks=[name for name, _ in model.named_modules()])
    assert outcome(traced, model, asked, Decisions()) == outcome(traced, model, asked, Forgetful())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack(layers: int) -> tuple[Program, Decisions]:
    known, mesh, model = Decisions(), Mesh(tp=2), nn.Sequential(*[Block() for _ in range(layers)])
    plan = resolve(shardc.Plan(tp={"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}), model, mesh)
    traced = trace(model, [torch.randn(4, 8)], marks=plan.marked)
    return decide(traced, Context(mesh, plan, traced.signature, decisions=known)), known


def test_further_layers_take_no_further_decisions():
    (some, known), (more, same) = stack(3), stack(5)
    assert len(call_nodes(some.global_gm)) < len(call_nodes(more.global_gm))
    assert 0 < len(known) == len(same)


# ---- two calls that differ in one thing


def decided(fn, *types: str, known: Decisions, mesh: Mesh = MESH, put_off: tuple[str, ...] = ()):
    """The decision of the last call of a graph, and that it is the one made without anything kept."""
    gm = build(fn, mesh, **{f"x{i}": t for i, t in enumerate(types)})
    node = call_nodes(gm)[-1]
    layouts = [parse(t, mesh)[1] for t in types]
    found = decide_node(node, layouts, mesh, put_off, known)
    node.meta.pop("rule")
    assert found == decide_node(node, layouts, mesh, put_off)
    return found


def differ(one: tuple, other: tuple, **options) -> None:
    known = Decisions()
    first, second = decided(*one, known=known, **options), decided(*other, known=known, **options)
    assert first != second
    assert len(known) == 2
    assert decided(*one, known=known, **options) is first  # and equal calls share theirs
    assert len(known) == 2


def test_a_static_argument_is_told_apart():
    call = "f32[8@dp, 16]"
    differ((lambda x0: aten.sum(x0, [0]), call), (lambda x0: aten.sum(x0, [1]), call))


def times(number: complex):
    return lambda x0: aten.mul(x0, number)


def test_a_true_is_no_one():
    known = Decisions()
    for number in (1, 1.0, True, -0.0, 0.0, 1):
        call_rule(call_nodes(build(times(number), MESH, x0="f32[8]"))[-1], known)
    assert len(known._rules) == 5


def test_a_split_is_told_apart_from_one_of_another_factor():
    def fn(x0):
        return aten.view(x0, [8, 3, 4])

    differ((fn, "f32[8, (3@dp 4)]"), (fn, "f32[8, 12@dp]"))


def test_a_pending_sum_is_told_apart():
    def fn(x0):
        return aten.neg(x0)

    differ((fn, "f32[8]"), (fn, "f32[8]+tp"))


def test_a_sum_that_is_put_off_is_told_apart():
    known = Decisions()
    call = (lambda x0, x1: aten.mm(x0, x1), "f32[8, 4]+dp", "f32[4, 32]")
    first, second = decided(*call, known=known), decided(*call, known=known, put_off=("dp",))
    assert first != second


def test_another_mesh_is_told_apart():
    known, call = Decisions(), (lambda x0: aten.neg(x0), "f32[5@tp]")
    line = rule_line("a -> a", nonempty="a")  # four ranks get 2, 2, 1 and 0 rows, three 2, 2 and 1
    with mock.patch.dict(TABLE, {aten.neg.default: lambda *a, **k: line}):
        first, second = decided(*call, known=known), decided(*call, known=known, mesh=Mesh(dp=2, tp=3))
    assert [str(d.results[0]) for d in (first, second)] == ["[5]", "[5@tp]"]


def test_operands_of_more_bytes_are_told_apart():
    def fn(x0, x1):
        return aten.mul(x0, x1)

    differ((fn, "f32[8@tp, 8]", "f64[8, 8@tp]"), (fn, "f64[8@tp, 8]", "f32[8, 8@tp]"))


def test_one_operand_twice_is_told_apart_from_two_that_are_alike():
    known = Decisions()
    for fn, types in ((lambda x0: aten.mul(x0, x0), 1), (lambda x0, x1: aten.mul(x0, x1), 2)):
        gm = build(fn, MESH, **{f"x{i}": "f32[8]" for i in range(types)})
        call_rule(call_nodes(gm)[-1], known)
    assert len(known._rules) == 2


def test_a_rule_that_was_registered_anew_is_another():
    known, call = Decisions(), (lambda x0: aten.neg(x0), "f32[8@dp]")
    first = decided(*call, known=known)
    with mock.patch.dict(TABLE, {aten.neg.default: lambda *a, **k: rule_line("a -> a", whole="a")}):
        assert decided(*call, known=known) != first


def test_an_argument_without_a_hash_is_decided_by_itself():
    known = Decisions()
    node = call_nodes(build(lambda x0: aten.neg(x0), MESH, x0="f32[8@dp]"))[-1]
    node.kwargs = {"where": slice(0, 1)}
    with mock.patch.dict(TABLE, {aten.neg.default: lambda *a, **k: rule_line("a -> a")}):
        assert call_rule(node, known) is not None
    assert not known._rules


class Alike(nn.Module):
    """Two equal branches, of which one is laid out by the user."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        free = torch.relu(x * 2)
        held = torch.relu(shardc.constrain(x * 2, Replicate()))
        return free + held


def test_a_constraint_by_the_user_holds_for_its_own_call_only():
    with pytest.warns(UserWarning, match="the plan is empty"):
        made = shardc.compile(Alike(), shardc.Plan(), mesh=Mesh(tp=2), inputs=Shard(0), outputs=Shard(0))
    nodes = call_nodes(made.lower(torch.randn(8, 4)).global_gm, aten.relu.default)
    assert [str(spec(n)) for n in nodes] == ["[8@tp, 4]", "[8, 4]"]
