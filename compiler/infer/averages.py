"""Which gradients are averaged over data-parallel ranks, whose losses are each rank's own.

Where all outputs that carry gradients are split over the same data-parallel mesh dims, parameter gradients are
divided by their ranks. Where outputs differ (a global loss beside split logits), what comes in for the split ones
is divided instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from shardc.compiler.ir.node import val
from shardc.compiler.ir.rewrite import emit
from shardc.compiler.ir.signature import Signature
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec


@dataclass(frozen=True)
class Averages:
    """axes: mesh dims over which parameter gradients are averaged. tangents: output -> the divisor of its gradient.
    later: the parameters whose gradients are kept back here, and divided when they are reduced."""

    axes: tuple[str, ...] = ()
    tangents: Mapping[int, int] = field(default_factory=dict)
    later: frozenset[str] = frozenset()

    @classmethod
    def of(cls, outputs: Mapping[int, Spec], signature: Signature, plan: Resolved, mesh: Mesh) -> Averages:
        """outputs: the layout of each user output, by position among the outputs."""
        splits = {
            i: tuple(a for a in plan.data_axes if layout.dim_of(a) is not None)
            for i, layout in outputs.items()
            if signature.outputs[i].requires_grad
        }
        if len(set(splits.values())) < 2:
            return cls(next(iter(splits.values()), ()))
        return cls((), {i: math.prod(mesh[a] for a in axes) for i, axes in splits.items() if axes})

    def divisor(self, parameter: str, plan: Resolved, mesh: Mesh) -> int:
        """By what a parameter's gradient is divided; not over mesh dims where it stays local."""
        if parameter in self.later:
            return 1
        return math.prod(mesh[a] for a in self.axes if a not in plan.params[parameter].local)


def divide_tangent(tangent: Node, ways: int) -> None:
    """Divide what comes in for backward, for all that uses it."""
    users = list(tangent.users)
    with tangent.graph.inserting_after(tangent):
        divided = emit(torch.ops.aten.div.Tensor, (tangent, ways), tangent, value=val(tangent), phase="backward")
    for user in users:
        user.replace_input_with(tangent, divided)
