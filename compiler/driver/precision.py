"""Mixed precision: what a module computes with is cast on the way in, what it gives on the way out.

%w: f32[16@dp, 8] = param w
%cast: bf16[16@dp, 8] = aten._to_copy(%w, dtype=bf16)          before the gather: bf16 travels
...
%grad_w: bf16[16, 8]+dp = aten.mm(...)
%cast_1: f32[16, 8]+dp = aten._to_copy(%grad_w, dtype=f32)     before the reduction, in the plan's reduce_dtype
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import inputs_of, output_node, placeholders, returned
from shardc.compiler.ir.node import set_val, tensors
from shardc.compiler.ir.rewrite import emit, redirect
from shardc.compiler.ir.signature import InputKind, OutputKind, TensorInfo, Traced
from shardc.compiler.plan.layout import Precision
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.rules.facts import CAST
from shardc.compiler.spec.sizes import name_shape, named_shape


def with_precision(plan: Resolved, precision: Precision | None) -> Resolved:
    """The plan with gradients reduced in the precision's dtype wherever no entry names one."""
    wire = precision and (precision.reduce or precision.param)
    if not wire:
        return plan
    return replace(plan, reduce_dtype={a: plan.reduce_dtype.get(a) or wire for a in plan.data_axes})


def computed_as(x: Any, precision: Precision | None) -> Any:
    """A value of a call as the module computes with it: floating-point tensors in the precision's dtype."""
    wanted = precision and precision.param
    if not wanted or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(wanted).requires_grad_(x.requires_grad)


def info_as(x: Tensor, precision: Precision | None) -> TensorInfo:
    """What tracing needs to know of a parameter or buffer. Buffers are computed with as they are."""
    info, wanted = TensorInfo.of(x), precision and precision.param
    cast = wanted and isinstance(x, nn.Parameter) and x.is_floating_point()
    return replace(info, dtype=wanted) if cast else info


def border_casts(module: nn.Module, precision: Precision | None) -> dict[str, torch.dtype]:
    """Modules that own floating-point parameters, with the dtype in which their inputs arrive."""
    wanted = precision and precision.param
    if not wanted:
        return {}
    owners = ((fqn, owner.parameters(recurse=False)) for fqn, owner in module.named_modules() if fqn)
    return {fqn: wanted for fqn, own in owners if any(p.is_floating_point() for p in own)}


def add_casts(traced: Traced, given: Mapping[str, torch.dtype], precision: Precision) -> Traced:
    """The traced graph between the dtypes that its inputs really have and those it was traced with.

    given: dtype of each parameter by name, and of each tensor of the call by its readable path.
    """
    gm, signature = traced.gm, traced.signature
    for entry, node in inputs_of(gm, signature, InputKind.PARAMETER, InputKind.BATCH):
        _cast_input(gm, node, given[entry.name], "forward")
    ends, starts = returned(gm), inputs_of(gm, signature, InputKind.TANGENT)
    for i, entry in enumerate(signature.outputs):
        if not isinstance(ends[i], Node) or entry.kind is OutputKind.MUTATION:
            continue
        if entry.kind is OutputKind.GRADIENT:
            source = signature.inputs[entry.of or 0]
            ends[i] = _cast_to(gm, ends[i], given.get(source.name))
        elif (out := _cast_to(gm, ends[i], precision.output)) is not ends[i]:
            ends[i] = out
            for tangent in (node for start, node in starts if start.of == i):
                assert precision.output is not None
                _cast_input(gm, tangent, precision.output, "backward")
    output_node(gm).args = (tuple(ends),)
    return traced


def _cast_input(gm: GraphModule, node: Node, given: torch.dtype, phase: str) -> None:
    """An input of this dtype, cast to the one it was traced with."""
    value = tensors(node)[0]
    if value.dtype is given:
        return
    users = [u for u in node.users if u.op != "output"]
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        cast = emit(CAST, (node,), node, {"dtype": value.dtype}, value=value, phase=phase)
    redirect(users, node, cast)
    set_val(node, name_shape(value.to(given), named_shape(value)))


def _cast_to(gm: GraphModule, node: Node, wanted: torch.dtype | None) -> Node:
    """A result in this dtype, cast as soon as it is there, so that its reduction need not wait."""
    value = tensors(node)[0]
    if wanted is None or value.dtype is wanted or not value.is_floating_point():
        return node
    with gm.graph.inserting_after(placeholders(gm)[-1] if node.op == "placeholder" else node):
        made = name_shape(value.to(wanted), named_shape(value))
        return emit(CAST, (node,), node, {"dtype": wanted}, value=made)


def call_dtypes(traced: Traced, args: Any, kwargs: Any) -> dict[str, torch.dtype]:
    """Dtype of each tensor of a call, by the name of the input that stands for it."""
    values, signature = pytree.tree_leaves((tuple(args), dict(kwargs))), traced.signature
    pairs = zip(signature.leaves, values, strict=True)
    return {signature.inputs[leaf.input].name: x.dtype for leaf, x in pairs if leaf.input is not None}
