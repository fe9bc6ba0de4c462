"""Floating-point operations of one call on one rank, by torch's own formulas (`torch.utils.flop_counter`)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from shardc.compiler.ir.graph import specs, tensors
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh


def flops(node: Node, mesh: Mesh) -> int:
    """Of a matrix product, convolution or attention, with a multiply and an add as two; 0 for all else."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: _local(n, mesh))  # pyright: ignore
    return int(formula(*args, **kwargs, out_val=_local(node, mesh)))


def _local(node: Node, mesh: Mesh) -> Any:
    """What rank 0 holds of a value, on meta."""
    values, layouts = tensors(node), specs(node)
    if not layouts or len(layouts) != len(values):
        values = tensors_in(node.meta.get("local"))
        return values[0] if len(values) == 1 else tuple(values)
    shapes = [s.local_shape(mesh, mesh.coords(0)) for s in layouts]
    found = tuple(torch.empty(n, dtype=t.dtype, device="meta") for n, t in zip(shapes, values, strict=True))
    return found[0] if len(found) == 1 else found
