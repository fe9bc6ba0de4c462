"""One model, one plan, one mesh: compiled it equals one device, or it was refused with a message."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import shardc
from shardc import Mesh, PlanError, Program, ShardingError
from shardc.compiler.driver.lowering import Lowering
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.signature import Traced
from shardc.compiler.trace.trace import trace

CLOSE = 1e-9  # relative to the largest element, or to one
FAULT = "fault of the compiler"  # what an error says that is no refusal


class Calls(nn.Module):
    """One function of forward's arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


class Refused(Exception):
    """compile or the first call said no, as a ShardingError or PlanError; its text is what was wrong."""


def agrees(
    model: nn.Module,
    inputs: Sequence[Tensor],
    mesh: Mesh,
    plan: Any,
    options: dict[str, Any] | None = None,
    tracer: Callable[..., Traced] = trace,
) -> Program:
    """Run the model alone and compiled: outputs, all gradients, buffers, and every value of the program are equal.

    Raises Refused where the compiler refuses; anything else that is raised is a fault.
    """
    alone = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            compiled = shardc.compile(model, plan, mesh=mesh, **(options or {}))
            lowering_of(compiled).tracing.trace = tracer
            program = compiled.lower(*inputs)
        except (PlanError, ShardingError) as error:
            if FAULT in str(error):
                raise
            raise Refused(error.what) from error
    ours, xs = _run(compiled, inputs)
    theirs, ys = _run(alone, inputs)
    assert len(ours) == len(theirs)
    for i, (have, want) in enumerate(zip(ours, theirs, strict=True)):
        same(have, want, f"output {i}")
        assert have.requires_grad == want.requires_grad, f"output {i}"
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        same(x.grad, y.grad, f"gradient of input {i}")
    for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        same(p.grad, q.grad, f"gradient of {name}")
    for (name, p), q in zip(compiled.named_buffers(), alone.buffers(), strict=True):
        same(p, q, name)
    program.verify(*inputs)
    return program


def same(have: Any, want: Any, what: str) -> None:
    """Both tensors, equal but for rounding; or both nothing."""
    assert (have is None) == (want is None), f"{what} is {have}, and {want} on one device"
    if want is None:
        return
    assert have.shape == want.shape, f"{what} has shape {tuple(have.shape)}, and {tuple(want.shape)} on one device"
    assert have.dtype == want.dtype, what
    if want.is_floating_point() and want.numel():
        scale = max(1.0, want.detach().nan_to_num().abs().max().item())
        torch.testing.assert_close(
            have, want, rtol=0, atol=CLOSE * scale, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )
    else:
        torch.testing.assert_close(have, want, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")


def _run(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(what a call returns, its inputs with their gradients), after a backward with fixed numbers."""
    given = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    returned = [t for t in pytree.tree_leaves(module(*given)) if isinstance(t, Tensor)]
    draw = torch.Generator().manual_seed(2)
    ends = [t for t in returned if t.requires_grad]
    tangents = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in ends]
    if ends:
        torch.autograd.backward(ends, tangents)
    return [t.detach().requires_grad_(t.requires_grad) for t in returned], given


class Once:
    """Traces a module, and gives the same trace for copies of it that are called with inputs of one shape."""

    def __init__(self) -> None:
        self._found: Traced | None = None

    def __call__(self, module: nn.Module, *args: Any, marks: Any, **options: Any) -> Traced:
        if self._found is None:
            names = [name for name, _ in module.named_modules()]  # marks that no plan speaks of do nothing
            self._found = trace(module, *args, marks=names, **options)
        return Traced(copy_graph(self._found.gm), self._found.signature)


def lowering_of(compiled: nn.Module) -> Lowering:
    """What finds and makes its programs."""
    return compiled._bound.lowering  # pyright: ignore


def traces_no_more(compiled: nn.Module) -> None:
    """From here on a call for which nothing is kept, or loaded, is a failure."""

    def fail(*args: Any, **options: Any) -> Traced:
        raise AssertionError("traced")

    lowering_of(compiled).tracing.trace = fail
