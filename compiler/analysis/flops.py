"""Floating-point operations of one call on one rank, by torch's own formulas (`torch.utils.flop_counter`)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from shardc.compiler.ir.node import of, specs, tensors, val
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
    """What rank 0 holds of a value, on meta; of several results those that are None keep their place."""
    whole, values, layouts = val(node), tensors(node), specs(node)
    if layouts and len(layouts) == len(values):
        shapes = [s.local_shape(mesh, mesh.coords(0)) for s in layouts]
        values = [torch.empty(n, dtype=t.dtype, device="meta") for n, t in zip(shapes, values, strict=True)]
    else:
        whole = of(node).local
        values = tensors_in(whole)
    if not isinstance(whole, (tuple, list)):
        return values[0] if values else None
    found = iter(values)
    return tuple(next(found) if isinstance(x, torch.Tensor) else None for x in whole)
