"""Floating-point operations of one call, by torch's own formulas (`torch.utils.flop_counter`) and some that it lacks.

Of matrix products, convolutions and attention, a multiply and an add as two; 0 for all else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from shardc.compiler.ir.node import local_value, val
from shardc.compiler.spec.mesh import Mesh

aten = torch.ops.aten


def _of_vectors(*args: Any, out_val: Tensor, **_: Any) -> int:
    """A product with a vector: every element of the matrix once."""
    return 2 * max(x.numel() for x in (*args, out_val) if isinstance(x, Tensor))


def _grouped(a: Tensor, b: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Products of groups of rows, or of groups of what is summed over."""
    return 2 * a.numel() * b.shape[-1] if a.dim() == b.dim() == 2 else 2 * out_val.numel() * a.shape[-1]


FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    **dict.fromkeys([aten.mv, aten.addmv, aten.dot, aten.vdot], _of_vectors),
    aten._grouped_mm: _grouped,
}
BY_NAME = {  # of libraries that may not be there
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda x, weight, *_, **__: 4 * x.numel() * weight.shape[-1],
}


def flops(node: Node, mesh: Mesh) -> int:
    """On rank 0, which holds the largest pieces."""
    return _counted(node, lambda n: local_value(n, mesh))


def global_flops(node: Node) -> int:
    """On one device."""
    return _counted(node, val)


def _counted(node: Node, value: Callable[[Node], Any]) -> int:
    packet = getattr(node.target, "overloadpacket", None)
    formula = FORMULAS.get(packet) or BY_NAME.get(str(packet))
    if formula is None:
        return 0
    args, kwargs = map_arg((node.args, dict(node.kwargs)), value)  # pyright: ignore
    return int(formula(*args, **kwargs, out_val=value(node)))
