"""The runner writes and verifies only what changed, and what it writes is the whole program as it stands."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.fx import GraphModule

import shardc
from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.graph import Unrun, call_nodes, copy_graph
from shardc.compiler.ir.text import text
from shardc.compiler.pipeline import runner as pipeline
from shardc.compiler.pipeline.runner import PassResult, Record, Runner
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.spec.mesh import Mesh
from tests.build import all_gather, build, context, parse

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=2)


class Step:
    """A pass that is one function."""

    name, exact = "step", True

    def __init__(self, fn, stage: Stage = Stage.RESHARDED) -> None:
        self.fn, self.takes, self.gives = fn, stage, stage

    def run(self, gm: GraphModule, ctx: object) -> PassResult:
        self.fn(gm)
        return PassResult()


class Careful(Runner):
    """Writes and verifies the whole graph beside what changed."""

    def run(self, step) -> Record:
        record = super().run(step)
        assert record.after == text(self._gm, self._ctx.mesh, self._names), step.name
        verify(self._gm, record.stage, self._ctx.mesh)
        return record


def test_every_pass_of_a_compilation_is_written_as_the_whole_graph_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shardc.compiler.driver.decide.Runner", Careful)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    plan = shardc.Plan(dp=shardc.FullyShard(), tp={"0": ColwiseParallel(), "3": RowwiseParallel()})
    assert len(shardc.compile(model, plan, mesh=MESH).lower(torch.randn(6, 8)).records) > 10


def started() -> tuple[Runner, GraphModule]:
    def fn(x):
        return aten.neg(aten.relu(all_gather(x, 0, "dp")))

    gm = build(fn, MESH, Stage.RESHARDED, x="f32[8@dp, 4]")
    made = Careful(gm, context(gm, MESH), {}, Stage.RESHARDED)
    made.run(Step(lambda gm: None))
    return made, gm


def test_a_new_name_is_written_where_it_is_used():
    runner, gm = started()

    def rename(gm: GraphModule) -> None:
        call_nodes(gm)[0].name = "another"

    assert "aten.relu(%another)" in runner.run(Step(rename)).after


def test_a_new_operand_is_written():
    runner, gm = started()

    def skip(gm: GraphModule) -> None:
        neg = call_nodes(gm)[-1]
        neg.replace_input_with(neg.all_input_nodes[0], call_nodes(gm)[0])

    after = runner.run(Step(skip)).after
    assert "aten.neg(%all_gather)" in after and "relu" not in after


def test_a_new_layout_is_verified_with_its_users_and_its_operands():
    for at in (0, 1, 2):  # a gather that gives another layout than it says, and two calls of which one needs another
        runner, gm = started()

        def relay(gm: GraphModule, at: int = at) -> None:
            call_nodes(gm)[at].meta["spec"] = parse("[8, 4@tp]", MESH)[1]

        if at < 2:
            with pytest.raises(ShardingError, match="cannot turn|needs operand"):
                runner.run(Step(relay))
        else:
            assert "f32[8, 4@tp] = aten.neg" in runner.run(Step(relay)).after


def test_a_value_of_another_shape_is_verified():
    runner, gm = started()

    def shrink(gm: GraphModule) -> None:
        node = call_nodes(gm)[1]
        node.meta["val"] = node.meta["val"][:4]

    with pytest.raises(ShardingError, match="has shape"):
        runner.run(Step(shrink))


def test_a_draw_that_nobody_needs_stays_and_what_is_dead_goes():
    def fn(x):
        aten.rand_like(x)
        aten.neg(aten.relu(x))
        return aten.abs(x)

    gm = build(fn, MESH, Stage.TRACED, x="f32[8]")
    pipeline._erase_dead(gm)
    assert [str(n.target) for n in call_nodes(gm)] == ["aten.rand_like.default", "aten.abs.default"]


def test_a_copy_generates_its_code_when_it_is_first_called():
    gm = copy_graph(build(lambda x: aten.neg(x), MESH, Stage.TRACED, x="f32[3]"))
    assert isinstance(gm, Unrun)
    assert "forward" not in vars(type(gm))
    assert gm(torch.ones(3))[0].tolist() == [-1, -1, -1]
    call_nodes(gm)[0].target = aten.abs.default
    gm.recompile()
    assert "abs" in gm.code
    assert gm(-torch.ones(3))[0].tolist() == [1, 1, 1]
