"""Runs a traced graph on real tensors and compares all it gives with what the module itself gives, eagerly."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from shardc.compiler.signature import InputKind, OutputKind
from shardc.compiler.trace import Traced, trace

SEED = 7


def fresh(tree: Any) -> Any:
    """A copy of every tensor, as leaves that require grad where the given ones do."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def held(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def run(traced: Traced, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tangents) -> list[Any]:
    """The graph's outputs, for the module's own parameters and buffers."""
    signature, values = traced.signature, held(module)
    batch, given = iter(signature.flatten_inputs(args, kwargs)), iter(tangents)
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


def check(module: nn.Module, *args: Any, grad: bool = True, **options: Any) -> Traced:
    """Traces `module(*args, **kwargs)` and holds outputs, mutations and gradients against eager's.

    `kwargs`, `marks` and `params` are options.
    """
    kwargs = options.pop("kwargs", {})
    before = {name: value.clone() for name, value in held(module).items()}
    traced = trace(module, args, kwargs, grad=grad, **options)
    for name, value in held(module).items():
        same(value, before[name], f"{name} after tracing")

    reference = copy.deepcopy(module)
    own_args, own_kwargs = fresh((args, kwargs))
    call_args, call_kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.clone() if t.requires_grad else t, (own_args, own_kwargs)
    )
    torch.manual_seed(SEED)
    with torch.set_grad_enabled(grad):
        expected = reference(*call_args, **call_kwargs)
    wants = [t for t in tensors(expected) if t.requires_grad]
    tangents = tangents_for(wants)
    torch.manual_seed(SEED)
    results = run(traced, module, *fresh((args, kwargs)), tangents)
    compare(traced, results, expected, wants, tangents, reference, (own_args, own_kwargs), (call_args, call_kwargs))
    return traced


def compare(traced, results, expected, wants, tangents, reference, own, called) -> None:
    signature = traced.signature
    assert len(results) == len(signature.outputs)
    for value, output in zip(results, signature.outputs, strict=True):
        assert (value is None) == (output.node is None), output
    ours = [r for r, o in zip(results, signature.outputs, strict=True) if o.kind is OutputKind.OUTPUT and o.node]
    rebuilt = signature.unflatten_outputs(ours)
    leaves, spec = pytree.tree_flatten(rebuilt)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec and type(rebuilt) is type(expected)
    for i, (a, b) in enumerate(zip(leaves, expected_leaves, strict=True)):
        same(a, b.detach() if isinstance(b, Tensor) else b, f"output leaf {i}")
        assert not isinstance(b, Tensor) or signature.outputs[i].requires_grad == b.requires_grad
    assert len(signature.indices(InputKind.TANGENT)) == len(wants)

    values = held(reference)
    batch, batch_after = tensors(own), tensors(called)
    positions = signature.indices(InputKind.BATCH)
    sources = [values[n] if n in values else batch[positions.index(i)] for i, n in names(signature)]
    if wants:
        torch.autograd.backward(wants, tangents)
    mutated = set()
    for value, output in zip(results, signature.outputs, strict=True):
        if output.kind is OutputKind.GRADIENT:
            gradient = sources[output.of].grad
            if value is None:
                assert gradient is None or not gradient.any(), output.name
            else:
                same(value, gradient, f"gradient of {output.name}")
        elif output.kind is OutputKind.MUTATION:
            mutated.add(output.of)
            new = values[output.name] if output.name in values else batch_after[positions.index(output.of)]
            same(value, new.detach(), f"mutation of {output.name}")
    check_nothing_missing(signature, sources, bool(wants), mutated, traced)


def names(signature) -> list[tuple[int, str]]:
    """(index, name) of the inputs up to the tangents; constants take the name of nothing held."""
    return [(i, x.name) for i, x in enumerate(signature.inputs) if x.kind in HELD_OR_BATCH]


HELD_OR_BATCH = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.BATCH)


def check_nothing_missing(signature, sources, differentiable, mutated, traced) -> None:
    pass
