"""ACCEPTANCE 39 and 62: dtypes of what is computed, what travels, what is kept and what is returned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.func import functional_call

import shardc
from shardc import FullyShard, Mesh, Plan, Precision, Program, Replicated
from tests.acceptance.models import Deep

BF16, F32 = torch.bfloat16, torch.float32
BOTH = [FullyShard("layers.*"), Replicated()]


def moved(program: Program) -> set[tuple[str, str, torch.dtype]]:
    return {(c.kind, c.phase, c.dtype) for c in program.collectives()}


def by_hand(model: nn.Module, x: Tensor, output: Any = None) -> Tensor:
    """The model with its parameters and input in bfloat16; gradients come back in the parameters' own dtype."""
    short = {name: p.to(BF16) for name, p in model.named_parameters()}
    out = functional_call(model, short, (x.to(BF16),))
    return out.to(output) if output else out


@pytest.mark.parametrize("entry", BOTH)
@pytest.mark.parametrize("output", [None, F32])
def test_masters_stay_while_short_copies_are_computed_with(entry: Any, output: Any):
    model = Deep(2, 8)
    alone, x = copy.deepcopy(model), torch.randn(4, 8)
    precision = Precision(param=BF16, reduce=F32, output=output)
    compiled = shardc.compile(model, Plan(dp=entry), mesh=Mesh(dp=2), precision=precision)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, alone)]
    for _ in range(2):
        outputs = [compiled(x), by_hand(alone, x, output)]
        assert outputs[0].dtype is (output or BF16)
        torch.testing.assert_close(*outputs, rtol=2e-2, atol=1e-2)
        for one, optim in zip(outputs, optimizers, strict=True):
            optim.zero_grad()
            one.float().square().mean().backward()
        for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None and p.grad.dtype is p.dtype is F32
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2)
        for optim in optimizers:
            optim.step()
    (program,) = compiled.programs
    program.verify(x)
    gathers = {("all_gather", "forward", BF16), ("all_gather", "backward", BF16), ("reduce_scatter", "backward", F32)}
    assert moved(program) == (gathers if isinstance(entry, FullyShard) else {("all_reduce", "backward", F32)})


@pytest.mark.parametrize(
    ("options", "precision", "gathered", "reduced"),
    [
        ({}, Precision(param=BF16), BF16, BF16),
        ({}, Precision(reduce=BF16), F32, BF16),
        ({"reduce_dtype": BF16}, None, F32, BF16),
        ({"reduce_dtype": F32}, Precision(param=BF16), BF16, F32),  # the plan's word counts
    ],
)
def test_each_dtype_is_chosen_by_itself(options: Any, precision: Any, gathered: Any, reduced: Any):
    plan = Plan(dp=FullyShard("layers.*", **options))
    program = shardc.compile(Deep(2, 8), plan, mesh=Mesh(dp=2), precision=precision).lower(torch.randn(4, 8))
    program.verify(torch.randn(4, 8))
    kinds = {(kind, dtype) for kind, _, dtype in moved(program)}
    assert kinds == {("all_gather", gathered), ("reduce_scatter", reduced)}
    assert {node.meta["val"].dtype for node in program.gm.graph.nodes if node.op == "placeholder"} == (
        {F32, BF16} if precision and precision.param else {F32}  # bfloat16 is the tangent of the output
    )


class Between(nn.Module):
    """Two layers with a value in single precision between them, and integers beside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layers[0](x)[rows].float().exp()
        return self.layers[1](h.to(x.dtype)), h


def test_a_value_in_single_precision_between_two_units_stays_so():
    precision = Precision(param=BF16, reduce=F32)
    compiled = shardc.compile(Between(), Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2), precision=precision)
    x, rows = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    y, h = compiled(x, rows)
    assert (y.dtype, h.dtype) == (BF16, F32)
    (y.float().sum() + h.sum()).backward()
    assert x.grad is not None and x.grad.dtype is F32
    compiled.programs[-1].verify(x, rows)


def test_parameters_are_cast_before_they_travel():
    precision = Precision(param=BF16)
    compiled = shardc.compile(nn.Linear(4, 4, bias=False), FullyShard(), mesh=Mesh(dp=2), precision=precision)
    lines = str(compiled.lower(torch.randn(2, 4))).splitlines()
    cast = next(i for i, line in enumerate(lines) if "_to_copy(%weight" in line)
    gather = next(i for i, line in enumerate(lines) if "all_gather" in line)
    assert lines[cast].startswith("%_to_copy") and "bf16[4@dp, 4]" in lines[cast]
    assert cast < gather and "bf16[4, 4]" in lines[gather]


def test_what_is_no_precision_is_refused():
    with pytest.raises(shardc.PlanError, match=r"precision is torch.bfloat16"):
        shardc.compile(nn.Linear(4, 4), FullyShard(), mesh=Mesh(dp=2), precision=BF16)  # pyright: ignore


class Wider(nn.Module):
    """What makes single precision of an activation: a table, an operator, a caller that passes by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.scale
        x = self.norm(torch.nn.functional.softplus(x.float()))
        return self.b(input=x + self.scale)


@pytest.mark.parametrize("plan", [FullyShard("a", "b"), Replicated(), {"a": ColwiseParallel(), "b": RowwiseParallel()}])
def test_what_enters_a_module_is_cast_to_what_it_computes_in(plan: Any):
    model, x = Wider(), torch.randn(4, 8)
    alone = copy.deepcopy(model)
    for layer in (alone.a, alone.norm, alone.b):
        layer.to(BF16)
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: pytree.tree_map(lambda t: t.to(BF16), (args, kwargs)), with_kwargs=True
        )
    compiled = shardc.compile(model, plan, mesh=Mesh(x=2), precision=Precision(param=BF16))
    have, want = compiled(x), alone(x)
    assert have.dtype is want.dtype is BF16
    torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)
    have.float().square().sum().backward()
    want.float().square().sum().backward()
    for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=5e-2, atol=5e-2, check_dtype=False)
    compiled.programs[-1].verify(x)
