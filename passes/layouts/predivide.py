"""Gradients are averaged before they are computed: what backward starts from is divided, not every gradient.

    %t: f32[8@dp, 4] = tangent of output 0                     %t: f32[8@dp, 4] = tangent of output 0
    %mm: f32[4, 16] = aten.mm(%t_1, %x)                        %div: f32[8@dp, 4] = aten.div.Tensor(%t, 2)
    %mark: f32[4, 16] = shardc.mark(%mm, ...)           ==>    %mm: f32[4, 16] = aten.mm(%t_1, %x)
    %div: f32[4, 16] = aten.div.Tensor(%mark, 2)               %mark: f32[4, 16] = shardc.mark(%mm, ...)
    return (%out, %div)                                        return (%out, %mark)

A loss is smaller than the parameters it depends on, and usually so are activations, so this spares a pass through all
gradients. Numbers of ranks that are powers of two alone: then both are the same to the bit, as long as nothing
underflows. Left alone: other numbers; a backward that is not linear in all that it starts from (clamped gradients,
gradients kept back at unsynchronised steps); gradients of which only some are averaged, as where inputs have some too;
tangents larger than the gradients; float16, also on the wire alone, as it underflows.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.infer.averages import divide_tangent
from shardc.compiler.infer.infer import call_rule
from shardc.compiler.ir.graph import call_nodes, placeholders, returned
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import arguments, local_nbytes, operands, tensors
from shardc.compiler.ir.rewrite import replace
from shardc.compiler.ir.signature import InputKind, OutputKind
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

DIVIDE = torch.ops.aten.div.Tensor
WIDE = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Predivide:
    name = "predivide"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        ends = returned(gm)
        gradients = [ends[i] for i in ctx.signature.indices(OutputKind.GRADIENT) if isinstance(ends[i], Node)]
        by = {_divisor(end) for end in gradients}
        ways = by.pop() if len(by) == 1 else 1
        wires = {dtype for dtype in ctx.plan.reduce_dtype.values() if dtype is not None}
        if ways == 1 or ways & (ways - 1) or not wires.issubset(WIDE):
            return PassResult()
        nodes = {n.name: n for n in placeholders(gm)}
        given = [(e, nodes[e.node]) for e in ctx.signature.inputs]
        tangents = [n for e, n in given if e.kind is InputKind.TANGENT and n.users]
        held = [n for e, n in given if e.kind is InputKind.PARAMETER]
        if sum(local_nbytes(n, ctx.mesh) for n in tangents) >= sum(local_nbytes(n, ctx.mesh) for n in held):
            return PassResult()
        scaled = _scaled(gm, tangents, ctx)
        if scaled is None or not all(end in scaled for end in gradients):
            return PassResult()
        for end in dict.fromkeys(gradients):
            replace(end, arguments(end)[0])
        for tangent in tangents:
            divide_tangent(tangent, ways)
        return PassResult(Counter(tangents=len(tangents), gradients=len(gradients)))


def _divisor(end: Node) -> int:
    """By what a returned gradient was divided last, as the plan wanted it; 1 for nothing."""
    if end.target is not DIVIDE or not isinstance(end.args[1], int) or arguments(end)[0].target is not MARK:
        return 1
    return end.args[1] if all(user.op == "output" for user in end.users) else 1


def _scaled(gm: GraphModule, tangents: list[Node], ctx: Context) -> set[Node] | None:
    """All that grows and shrinks with the tangents; None where something does otherwise."""
    found = {*tangents}
    for node in call_nodes(gm):
        if found.isdisjoint(node.all_input_nodes):
            continue
        if not _is_linear(node, found, ctx) or not all(x.dtype in WIDE for x in tensors(node)):
            return None
        found.add(node)
    return found


def _is_linear(node: Node, scaled: set[Node], ctx: Context) -> bool:
    """Whether scaling these operands scales all results, by what the operator's rule says of sums."""
    if node.target in (MARK, operator.getitem):
        return True
    rule = call_rule(node, ctx.decisions)
    return rule is not None and frozenset(i for i, n in enumerate(operands(node)) if n in scaled) in rule.linear
