"""Floating-point operations of one call on one rank, by torch's own formulas (`torch.utils.flop_counter`)."""

from __future__ import annotations

from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from shardc.compiler.ir.node import local_value
from shardc.compiler.spec.mesh import Mesh


def flops(node: Node, mesh: Mesh) -> int:
    """Of a matrix product, convolution or attention, with a multiply and an add as two; 0 for all else."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: local_value(n, mesh))  # pyright: ignore
    return int(formula(*args, **kwargs, out_val=local_value(node, mesh)))
