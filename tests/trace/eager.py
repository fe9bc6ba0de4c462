"""Runs a traced graph on real tensors and compares all it gives with what the module itself gives, eagerly."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from shardc.compiler.ir.signature import InputKind, OutputKind, Traced
from shardc.compiler.trace.trace import trace

SEED = 7


def fresh(tree: Any) -> Any:
    """A copy of every tensor, as leaves that require grad where the given ones do."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def held(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def run(traced: Traced, values: Mapping[str, Tensor], call: Any, tangents: Sequence[Tensor]) -> list[Any]:
    """The graph's outputs, with these parameters and buffers."""
    signature = traced.signature
    batch, given = iter(signature.flatten_inputs(*call)), iter(tangents)
    flat: list[Any] = []
    for i in signature.inputs:
        match i.kind:
            case InputKind.PARAMETER | InputKind.BUFFER:
                flat.append(values[i.name])
            case InputKind.CONSTANT:
                flat.append(i.value)
            case InputKind.BATCH:
                flat.append(next(batch))
            case InputKind.TANGENT:
                flat.append(next(given))
    with torch.no_grad():
        return list(traced.gm(*(t.detach().clone() for t in flat)))


def tangents_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def same(a: Any, b: Any, what: str) -> None:
    torch.testing.assert_close(a, b, msg=lambda m: f"{what}: {m}")


def check(module: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Traced:
    """Traces `module(*args, **kwargs)` and holds outputs, mutations and gradients against eager's."""
    call = (args, dict(kwargs or {}))
    traced = trace(module, *call, **options)
    compare(traced, module, call, options.get("grad", True))
    return traced


def compare(traced: Traced, module: nn.Module, call: tuple[tuple, dict[str, Any]], grad: bool = True) -> None:
    """Holds what was traced against the module, called so."""
    own = fresh(call)
    before = {name: value.detach().clone() for name, value in held(module).items()}
    # An input that requires grad is no leaf to forward, so that it may be changed in place.
    called = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, own)
    started = [t.detach().clone() for t in tensors(called)]
    torch.manual_seed(SEED)
    with torch.set_grad_enabled(grad):
        expected = module(*called[0], **called[1])
    wants = [*{id(t): t for t in tensors(expected) if t.requires_grad}.values()]  # one tensor has one gradient
    tangents = tangents_for(wants)
    torch.manual_seed(SEED)
    results = run(traced, before, fresh(call), tangents)
    if wants:
        torch.autograd.backward(wants, tangents)

    check_outputs(traced, results, expected)
    leaves, after = by_input(traced, held(module), own), by_input(traced, held(module), called)
    first = by_input(traced, before, started)
    check_gradients(traced, results, leaves)
    check_mutations(traced, results, first, after)


def by_input(traced: Traced, values: Mapping[str, Tensor], call: Any) -> dict[int, Tensor]:
    """The tensor behind each parameter, buffer and batch input, by its index."""
    batch = iter(tensors(call))
    out = {}
    for index, i in enumerate(traced.signature.inputs):
        if i.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            out[index] = values[i.name]
        elif i.kind is InputKind.BATCH:
            out[index] = next(batch)
    return out


def check_outputs(traced: Traced, results: list[Any], expected: Any) -> None:
    outputs = traced.signature.outputs
    assert [r is None for r in results] == [o.node is None for o in outputs]
    user = [(r, o) for r, o in zip(results, outputs, strict=True) if o.kind is OutputKind.OUTPUT]
    rebuilt = traced.signature.unflatten_outputs([r for r, o in user if o.node])
    leaves, spec = pytree.tree_flatten(rebuilt)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec and type(rebuilt) is type(expected)
    for (_, output), a, b in zip(user, leaves, expected_leaves, strict=True):
        same(a, b.detach() if isinstance(b, Tensor) else b, output.name)
        if output.same is None:  # else it is another output's tensor
            assert output.requires_grad == (isinstance(b, Tensor) and b.requires_grad), output


def check_gradients(traced: Traced, results: list[Any], leaves: dict[int, Tensor]) -> None:
    outputs = traced.signature.outputs
    found = {o.of: r for r, o in zip(results, outputs, strict=True) if o.kind is OutputKind.GRADIENT}
    for index, leaf in leaves.items():
        name = traced.signature.inputs[index].name
        if leaf.grad is None:
            assert found.get(index) is None, f"{name} has a gradient"
        else:
            same(found[index], leaf.grad, f"gradient of {name}")


def check_mutations(traced: Traced, results: list[Any], first: dict[int, Tensor], after: dict[int, Tensor]) -> None:
    outputs = traced.signature.outputs
    found = {o.of: r for r, o in zip(results, outputs, strict=True) if o.kind is OutputKind.MUTATION}
    for index, value in after.items():
        name = traced.signature.inputs[index].name
        if index in found:
            same(found[index], value.detach(), f"new value of {name}")
        else:
            assert torch.equal(first[index], value.detach()), f"{name} changed"
