"""Gradients are averaged over data-parallel ranks, each of which has a loss of its own: where it costs least.

    %t: f32[8@dp, 4] = tangent of output 0                     %t: f32[8@dp, 4] = tangent of output 0
    %mm: f32[4, 16] = aten.mm(%x, %t)                          %div: f32[8@dp, 4] = aten.div.Tensor(%t, 2)
    %mark: f32[4, 16] = shardc.mark(%mm, ...)           ==>    %mm: f32[4, 16] = aten.mm(%x, %div)
    return (%out, %mark)                                       %mark: f32[4, 16] = shardc.mark(%mm, ...)
                                                               return (%out, %mark)

A loss is smaller than the parameters it depends on, and usually so are activations: dividing what backward starts
from spares a pass through all gradients. For numbers of ranks that are powers of two both are the same to the bit,
as long as nothing underflows. Each gradient is divided by itself, behind its mark and so behind its reduction, for
other numbers; where backward is not linear in all that it starts from (clamped gradients); where only some gradients
are averaged, as where inputs have some too, or a parameter is ignored; where tangents are larger than gradients; in
float16, also on the wire alone, as it underflows. Where outputs are split over different data-parallel mesh dims (a
global loss beside split logits), no one number is right for a gradient: what comes in for each is divided.

A gradient kept back at an unsynchronised step is divided there, so what is carried on is added to one that is.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.infer.decisions import call_rule
from shardc.compiler.ir.graph import call_nodes, placeholders, returned
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import arguments, local_nbytes, of, operands, spec, tensors, val
from shardc.compiler.ir.rewrite import emit, redirect
from shardc.compiler.ir.signature import Input, InputKind, OutputKind
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage

WIDE = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
Given = Mapping[Node, Input]  # what each placeholder is


@dataclass(frozen=True)
class AverageGradients:
    name = "average-gradients"
    takes = gives = Stage.TRACED
    exact = False  # a gradient that is averaged is another value
    early: bool = True  # whether what backward starts from may be divided in place of gradients

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        given = dict(zip(placeholders(gm), ctx.signature.inputs, strict=True))
        starts = {n: _split(n, ctx) for n, entry in given.items() if entry.kind is InputKind.TANGENT and n.users}
        if len({*starts.values()}) > 1:
            return _divide_starts({n: math.prod(ctx.mesh[a] for a in axes) for n, axes in starts.items()})
        axes, ends = next(iter(starts.values()), ()), _gradients(gm, given, ctx)
        ways = {source: _ways(given[source], axes, ctx) for source in ends}
        by = max(ways.values(), default=1)
        alike = all(n == by for n in ways.values())
        if self.early and alike and _may_start(gm, given, ends.values(), by, ctx):
            return _divide_starts(dict.fromkeys(starts, by))
        for source, end in ends.items():
            _divide(source, ways[source], *_place(end, given))
        return PassResult(Counter(gradients=sum(n > 1 for n in ways.values())))


def _split(tangent: Node, ctx: Context) -> tuple[str, ...]:
    """The data-parallel mesh dims whose ranks have losses of their own: those that split an output, or its tangent
    is pending over."""
    layout = spec(tangent)
    return tuple(a for a in ctx.plan.data_axes if layout.dim_of(a) is not None or a in dict(layout.pending))


def _gradients(gm: GraphModule, given: Given, ctx: Context) -> dict[Node, Node]:
    """What is returned as the gradient of each input that has one."""
    ends, inputs, signature = returned(gm), [*given], ctx.signature
    places = [i for i in signature.indices(OutputKind.GRADIENT) if isinstance(ends[i], Node)]
    return {inputs[signature.outputs[i].of or 0]: ends[i] for i in places}


def _ways(source: Input, axes: tuple[str, ...], ctx: Context) -> int:
    """By what a gradient is divided; an input's is each rank's own, and so is a parameter's where it is ignored."""
    if source.kind is not InputKind.PARAMETER:
        return 1
    return math.prod(ctx.mesh[a] for a in axes if a not in ctx.plan.params[source.name].local)


def _place(end: Node, given: Given) -> tuple[Node, list[Node]]:
    """Where a gradient is averaged, and for whom: behind its mark, or before what was kept back is added to it."""
    total = arguments(end)[0]
    carried = any(n in given and given[n].kind is InputKind.CARRY for n in total.all_input_nodes)
    return (arguments(total)[0], [total]) if carried else (end, list(end.users))


def _divide_starts(ways: Mapping[Node, int]) -> PassResult:
    for tangent, by in ways.items():
        _divide(tangent, by, tangent, list(tangent.users))
    return PassResult(Counter(tangents=sum(by > 1 for by in ways.values())))


def _divide(source: Node, by: int, node: Node, users: Sequence[Node]) -> None:
    """Divide a value for these users, and say so of the input whose tangent or gradient it is."""
    if by == 1:
        return
    of(source).divided = by
    with node.graph.inserting_after(node):
        divided = emit(torch.ops.aten.div.Tensor, (node, by), node, value=val(node), phase="backward")
    redirect(users, node, divided)


def _may_start(gm: GraphModule, given: Given, ends: Collection[Node], by: int, ctx: Context) -> bool:
    """Whether dividing what backward starts from divides every gradient, to the bit, and is less work."""
    wires = {dtype for dtype in ctx.plan.reduce_dtype.values() if dtype is not None}
    if by & (by - 1) or not wires.issubset(WIDE):
        return False
    sizes = Counter()
    for node, entry in given.items():
        sizes[entry.kind] += local_nbytes(node, ctx.mesh) if node.users else 0
    if not ctx.decisions.once("average early", lambda: sizes[InputKind.TANGENT] < sizes[InputKind.PARAMETER]):
        return False
    late = [n for n, entry in given.items() if entry.kind in (InputKind.TANGENT, InputKind.CARRY)]
    scaled = _scaled(gm, late, ctx)
    return scaled is not None and all(end in scaled for end in ends)


def _scaled(gm: GraphModule, sources: list[Node], ctx: Context) -> set[Node] | None:
    """All that grows and shrinks with these; None where something does otherwise."""
    found = {*sources}
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
