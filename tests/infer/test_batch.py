"""What of inputs and outputs is rows of the batch, as a module's graph shows where nobody says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from shardc import Layout, Mesh, Plan, PlanError, Replicated
from shardc.compiler.infer.batch import Batch
from shardc.compiler.ir.graph import results_of
from shardc.compiler.ir.signature import OutputKind
from shardc.compiler.plan.resolve import resolve
from shardc.compiler.rules.ops import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.compiler.trace.trace import trace

ROWS = (8, 6)
DP = Plan(dp=Replicated())


class Two(nn.Module):
    """forward(x, other) is a function of the model and both."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.up, self.scale = nn.Linear(6, 5), nn.Parameter(torch.ones(6))
        self.register_buffer("table", torch.ones(5))
        self.function = function

    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.function(self, x, other)


def batch_of(function: Callable[..., Any], x: tuple, other: tuple, mesh: Mesh | None = None, **layouts: Any) -> Batch:
    mesh = mesh or Mesh(dp=2)
    model = Two(function)
    plan = Plan(dp=Replicated(), **{a: {"up": "colwise"} for a in mesh.names if a != "dp"})
    traced = trace(model, (torch.randn(x), torch.randn(other)))
    return Batch(traced.gm, traced.signature, resolve(plan, model, mesh, **layouts))


NO_ROWS = {
    "its rows are the columns of one that is rows": (lambda m, x, mask: m.up(x @ mask), ROWS, (6, 6)),
    "the same where there are as many rows as columns": (lambda m, x, mask: m.up(x @ mask), (6, 6), (6, 6)),
    "its rows are a dim of a parameter": (lambda m, x, weight: m.up(x) * weight, ROWS, (5,)),
    "it has one row where others have more": (lambda m, x, places: m.up(x + places), ROWS, (1, 6)),
}
ALL_ROWS = {
    "two that are added": (lambda m, x, y: m.up(x + y), ROWS, ROWS),
    "a number for each row": (lambda m, x, y: m.up(x) * y[:, None], ROWS, (8,)),
    "each has one row": (lambda m, x, y: m.up(x + y), (1, 6), (1, 6)),
    "a scalar, which has no rows to ask about": (lambda m, x, y: m.up(x) * y, ROWS, ()),
}


@pytest.mark.parametrize("why", NO_ROWS)
def test_an_input_that_is_no_rows_is_whole(why: str):
    batch = batch_of(*NO_ROWS[why])
    batch.check()
    assert batch.whole == {"other"}


@pytest.mark.parametrize("why", ALL_ROWS)
def test_left_alone_where_every_input_is_rows(why: str):
    batch = batch_of(*ALL_ROWS[why])
    batch.check()
    assert batch.whole == set()


def pairs(model: Two, x: Tensor, other: Tensor) -> Tensor:
    return model.up(x) @ other.t()


ASKED = {
    "rows meet in pairs": (pairs, ROWS, (3, 5)),
    "in pairs, as many of each": (pairs, ROWS, (8, 5)),
    "one row comes first": (lambda m, x, y: m.up(x + y), (1, 6), ROWS),
}


@pytest.mark.parametrize("why", ASKED)
def test_the_user_is_asked_where_the_graph_does_not_tell(why: str):
    with pytest.raises(PlanError) as error:
        batch_of(*ASKED[why]).check()
    assert error.value.what == "other may be a part of the batch, as x is, or the same on every rank"
    assert error.value.help == ("say which: compile(..., inputs={'other': Shard(0)}) or inputs={'other': Replicate()}")


@pytest.mark.parametrize("said", [Shard(0), Replicate()])
def test_the_line_that_is_asked_for_is_an_answer(said: Any):
    batch = batch_of(pairs, ROWS, (3, 5), inputs={"other": said})
    batch.check()
    assert batch.whole == set()  # of what is told nothing is inferred


def test_the_line_to_write_names_the_mesh_dim_where_there_are_several():
    mesh = Mesh(dp=2, tp=2)
    with pytest.raises(PlanError) as error:
        batch_of(pairs, ROWS, (3, 5), mesh).check()
    assert "{'other': Layout(dp=Shard(0))}" in error.value.help and "{'other': Layout()}" in error.value.help
    for said in (Layout(dp=Shard(0)), Layout()):
        batch_of(pairs, ROWS, (3, 5), mesh, inputs={"other": said}).check()


RESULTS = {
    "rows": (lambda m, x: m.up(x), 0),
    "rows in another dim": (lambda m, x: m.up(x).t(), 1),
    "rows behind a new dim": (lambda m, x: m.up(x)[None], 1),
    "rows within a dim": (lambda m, x: m.up(x).flatten(), 0),
    "rows within a dim, behind something else": (lambda m, x: m.up(x).t().flatten(), 0),
    "a sum over the rows": (lambda m, x: m.up(x).sum(0), None),
    "a number": (lambda m, x: m.up(x).mean(), None),
    "of a parameter": (lambda m, x: m.scale * 2, None),
    "of a buffer, as many as there are rows": (lambda m, x: m.table.repeat(2)[:8], None),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_split_along_what_the_rows_have_become(name: str):
    function, dim = RESULTS[name]
    model = Two(lambda m, x, y: function(m, x + y))
    traced = trace(model, (torch.randn(ROWS), torch.randn(ROWS)))
    batch = Batch(traced.gm, traced.signature, resolve(DP, model, Mesh(dp=2)))
    ((_, end),) = results_of(traced.gm, traced.signature, OutputKind.OUTPUT)
    assert batch.rows_of(end) == dim
    assert batch.depends(end) == ("parameter" not in name and "buffer" not in name)
