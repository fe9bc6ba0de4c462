"""Gradients kept back at unsynchronised steps come in again as inputs of the next synchronised backward.

%carry_w: f32[24, 16]+dp = carry net1.weight
%add: f32[24, 16]+dp = aten.add.Tensor(%grad_w, %carry_w)      one reduction serves all steps
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from shardc.compiler.ir.graph import output_node, placeholders, returned
from shardc.compiler.ir.node import of, val
from shardc.compiler.ir.rewrite import emit, inherit
from shardc.compiler.ir.signature import Input, InputKind, OutputKind, Traced


def add_carries(traced: Traced, names: Collection[str]) -> Traced:
    """The traced graph with one more input for each of these parameters, added to its gradient."""
    gm, signature = traced.gm, traced.signature
    end, entries, ends = output_node(gm), list(signature.inputs), returned(gm)
    for i in signature.indices(OutputKind.GRADIENT):
        source = signature.inputs[signature.outputs[i].of or 0]
        gradient = ends[i]
        if source.kind is not InputKind.PARAMETER or source.name not in names or gradient is None:
            continue
        with gm.graph.inserting_after(placeholders(gm)[-1]):
            carry = gm.graph.placeholder(f"carry_{source.node}")
        inherit(carry, gradient, ("val", "path"))
        of(carry).phase = "backward"
        with gm.graph.inserting_before(end):
            ends[i] = emit(torch.ops.aten.add.Tensor, (gradient, carry), gradient, value=val(gradient))
        entries.append(Input(carry.name, InputKind.CARRY, source.name))
    end.args = (tuple(ends),)
    return Traced(gm, replace(signature, inputs=tuple(entries)))
