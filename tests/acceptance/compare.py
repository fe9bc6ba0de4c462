"""A compiled model beside an untouched copy of it, on the same global batch."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import shardc
from shardc import Program

USUAL = {"rtol": 2e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # for float64
SGD = partial(torch.optim.SGD, lr=1e-3)  # small: a step too large makes rounding grow from one to the next
ADAM = partial(torch.optim.Adam, lr=0.01)


def counts(program: Program) -> dict[tuple[str, str, str], int]:
    """How many collectives of each kind, mesh dim and phase a program has."""
    return dict(Counter((c.kind, c.mesh_dim, c.phase) for c in program.collectives()))


def forward(kind: str, n: int = 1) -> dict[tuple[str, str, str], int]:
    """What `counts` says of n collectives over tp in forward."""
    return {(kind, "tp", "forward"): n}


def backward(kind: str, n: int = 1) -> dict[tuple[str, str, str], int]:
    """What `counts` says of n collectives over tp in backward."""
    return {(kind, "tp", "backward"): n}


def at_most(program: Program, limits: Mapping[tuple[str, str, str], int]) -> bool:
    """Whether a program has no more collectives of any sort than these."""
    return all(n <= limits.get(what, 0) for what, n in counts(program).items())


def wire_bytes(program: Program) -> int:
    """Bytes that the rank that sends most puts on the wire, forward and backward."""
    return sum(c.bytes_on_wire for c in program.collectives())


def compare(
    model: nn.Module,
    plan: Any,
    mesh: shardc.Mesh,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    steps: int = 1,
    grads: bool = True,
    close: Mapping[str, float] | None = None,
    prove: bool = True,
    **options: Any,
) -> Program:
    """Train both for some steps: outputs, gradients of parameters and inputs, parameters, buffers, and the
    forward after the last step are the same. grads: whether floating-point inputs need a gradient. close:
    tolerances, which float64 models need not name. Returns the program, of which there is only one."""
    kwargs = dict(kwargs or {})
    close = close or (EXACT if _is_double(model) else USUAL)
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, plan, mesh=mesh, **options)
    both = (compiled, alone)
    optimizers = [optimizer(_trained(m)) if _trained(m) else None for m in both]
    for _ in range(steps):
        _same_step(compiled, alone, args, kwargs, grads, close)
        for one in filter(None, optimizers):
            one.step()
            one.zero_grad()
        same_state(compiled, alone, close)
    leaves = [_leaves(m, args, kwargs, grads)[0] for m in both]
    torch.testing.assert_close(*leaves, **close, msg=_says("the forward after the last step"))
    assert len(compiled.programs) == 1
    program = compiled.programs[-1]
    if prove:
        program.verify(*args, **kwargs)
    return program


def same_state(compiled: nn.Module, alone: nn.Module, close: Mapping[str, float] = USUAL) -> None:
    """Parameters and buffers are the same tensors under the same names, in the same order."""
    ours, theirs = compiled.state_dict(), alone.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **close, msg=_says(name))


def same_gradients(compiled: nn.Module, alone: nn.Module, close: Mapping[str, float] = USUAL) -> None:
    """Every parameter has the same gradient, or none in both."""
    ours, theirs = dict(compiled.named_parameters()), dict(alone.named_parameters())
    assert list(ours) == list(theirs)
    for name, param in theirs.items():
        assert ours[name].requires_grad == param.requires_grad, name
        have, want = ours[name].grad, param.grad
        assert (have is None) == (want is None), f"{name}: gradient {have} where one device has {want}"
        if want is not None:
            torch.testing.assert_close(have, want, **close, msg=_says(f"gradient of {name}"))


def _same_step(
    compiled: nn.Module, alone: nn.Module, args: Any, kwargs: Any, grads: bool, close: Mapping[str, float]
) -> None:
    (ours, xs), (theirs, ys) = (_leaves(m, args, kwargs, grads) for m in (compiled, alone))
    torch.testing.assert_close(ours, theirs, **close, msg=_says("outputs"))
    ends = [i for i, t in enumerate(theirs) if t.requires_grad]
    assert [i for i, t in enumerate(ours) if t.requires_grad] == ends
    tangents = [torch.randn_like(theirs[i]) for i in ends]
    for outputs in (ours, theirs):
        torch.autograd.backward([outputs[i] for i in ends], [t.clone() for t in tangents])
    same_gradients(compiled, alone, close)
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        assert (x.grad is None) == (y.grad is None), f"input {i}"
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, **close, msg=_says(f"gradient of input {i}"))


def _leaves(module: nn.Module, args: Any, kwargs: Any, grads: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors that a call returns, tensors it was given: fresh leaves of autograd's graph)."""

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        new = x.detach().clone()
        return new.requires_grad_(grads and (x.is_floating_point() or x.is_complex()))

    given, named = pytree.tree_map(fresh, (tuple(args), dict(kwargs)))
    returned = pytree.tree_leaves(module(*given, **named))
    inputs = [x for x in pytree.tree_leaves((given, named)) if isinstance(x, Tensor)]
    return [t for t in returned if isinstance(t, Tensor)], inputs


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _is_double(module: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in module.parameters())


def _says(what: str) -> Callable[[str], str]:
    return lambda text: f"{what}: {text}"


def held_numel(program: Program) -> int:
    """Elements of all parameters that rank 0, which holds most, holds."""
    mesh = program.mesh
    layouts = [layout.stored for layout in program.plan.params.values()]
    return sum(math.prod(spec.local_shape(mesh, mesh.coords(0))) for spec in layouts)


def moved_numel(program: Program, mesh_dim: str) -> int:
    """Elements that the collectives over a mesh dim are called with."""
    return sum(c.numel for c in program.collectives() if c.mesh_dim == mesh_dim)


def output_shape(program: Program, i: int = 0) -> tuple[int, ...]:
    """The shape of an output on rank 0, which holds the largest piece."""
    returned = program.halves.forward.graph.output_node().args[0]
    spec = returned[i].meta["spec"]  # pyright: ignore
    return spec.local_shape(program.mesh, program.mesh.coords(0))
