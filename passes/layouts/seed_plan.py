"""The user's wishes become layouts: of inputs and parameters, of marks, and of what the program returns.

    %w: f32[32, 16] = param net1.weight
    return (%out, %grad_w)
  ==>
    %w: f32[32@tp, 16] = param net1.weight                      tp: {"net1": ColwiseParallel()}
    %reshard: f32[8, 16] = shardc.reshard(%out, [8, 16])        an output leaves as the caller expects it
    %reshard_1: f32[32@tp, 16] = shardc.reshard(%grad_w, ...)   a gradient lies as its parameter does
    return (%reshard, %reshard_1)

A parameter stored in one layout and computed with in another gets a reshard right behind it: that is
FSDP's gather, and the gradient's reshard back is its reduce-scatter. Left alone: marks no plan entry speaks of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.errors import PlanError
from shardc.compiler.infer.batch import Batch, NotRows
from shardc.compiler.infer.marked_layouts import input_layout, output_layout, told
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes, inputs_of, output_node, placeholders, returned
from shardc.compiler.ir.marks import MARK, UnlessPending, parse_key
from shardc.compiler.ir.node import arguments, nbytes, of, set_spec, shape, spec, val
from shardc.compiler.ir.rewrite import emit, redirect
from shardc.compiler.ir.signature import Input, InputKind, Output, OutputKind
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import CAST
from shardc.compiler.spec.sizes import of_data
from shardc.compiler.spec.spec import REPLICATE, Spec, from_placements


@dataclass(frozen=True)
class SeedPlan:
    name = "seed-plan"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for mark in call_nodes(gm, MARK):
            changes["marks"] += _wish(mark, ctx)
        batch = _batch(gm, ctx)
        outputs, tangents = _output_specs(gm, batch, ctx)
        for entry, node in inputs_of(gm, ctx.signature):
            layout, of(node).why = _input_layout(node, entry, tangents, batch, ctx)
            set_spec(node, layout)
        _fix_outputs(gm, outputs, ctx)
        for entry, node in inputs_of(gm, ctx.signature, InputKind.PARAMETER):
            changes["gathers"] += _compute_layout(node, entry.name, ctx)
        return PassResult(changes)


def _batch(gm: GraphModule, ctx: Context) -> Batch | None:
    """What is rows of the batch. Raises NotRows where ranks were taken to pass rows and do not."""
    if not ctx.plan.data_axes:
        return None
    batch = Batch(gm, ctx.signature, ctx.plan, ctx.decisions)
    taken = [entry for entry, _ in inputs_of(gm, ctx.signature, InputKind.BATCH) if entry.rows]
    if wrong := [entry.name for entry in taken if entry.name in batch.whole]:
        raise NotRows(wrong)
    if taken:
        batch.check()
    return batch


def _wish(mark: Node, ctx: Context) -> bool:
    """What the plan or the user's `constrain` says of a mark: (mesh dim, placement, open, reason) entries."""
    text: str = arguments(mark)[1]
    key = parse_key(text)
    if key.grad:
        return False
    try:
        of(mark).wish = wishes = ctx.plan.wished(text)
    except PlanError as error:
        raise error.at(of(mark).where) from None
    place = {"in": "what enters", "out": "what leaves"}.get(key.kind)
    what = f"{place} {key.fqn or 'the model'}" if place else "the value given to constrain"
    if of(mark).data and not place and any(placement != REPLICATE for _, placement, *_ in wishes):
        raise _by_data(what, mark)
    for axis, placement, _, said in wishes:
        try:
            Spec.whole(shape(mark)).place(axis, placement, ctx.mesh)
        except ValueError as error:
            raise _misfit(what, mark, error, said if place else "") from None
    return bool(wishes)


def _misfit(what: str, node: Node, error: ValueError, excerpt: str = "") -> PlanError:
    return PlanError(
        f"{what} has shape {shape(node)}: {error}",
        where=of(node).where,
        excerpt=excerpt,
        help="name a dim that the tensor has",
    )


def _by_data(what: str, node: Node) -> PlanError:
    return PlanError(
        f"{what} has shape {list(shape(node))}, of which data decides a size: it lies whole on every rank",
        where=of(node).where,
        help="give it no layout that splits it",
    )


def _input_layout(
    node: Node, entry: Input, tangents: Mapping[int, Spec], batch: Batch | None, ctx: Context
) -> tuple[Spec, str]:
    """The layout that an input comes in, and the plan entry behind it in words."""
    match entry.kind:
        case InputKind.PARAMETER | InputKind.BUFFER if layout := ctx.plan.layout(entry.name):
            return layout.stored, layout.why
        case InputKind.BATCH:
            given = ctx.plan.calls.given("in", entry.name, len(shape(node)))
            whole = batch is not None and (entry.rows is False or entry.name in batch.whole)
            layout = input_layout(node, entry.name, ctx.plan, None if whole else 0)
            return _placed(node, layout, ctx, f"input {entry.name}"), "" if given is None else "inputs="
        case InputKind.TANGENT:
            return tangents[entry.of or 0], ""
        case InputKind.CARRY:
            return ctx.carries[entry.name], ""
    return Spec.whole(shape(node)), ""


def _placed(node: Node, layout: Mapping[str, Any], ctx: Context, what: str) -> Spec:
    ordered = {axis: layout[axis] for axis in ctx.mesh.names if axis in layout}
    try:
        return from_placements(shape(node), ordered, ctx.mesh)
    except ValueError as error:
        raise _misfit(what, node, error) from None


def _output_specs(gm: GraphModule, batch: Batch | None, ctx: Context) -> tuple[dict[int, Spec], dict[int, Spec]]:
    """The layout each user output leaves with, and that in which its tangent comes, by position among the outputs.

    Each rank's summand of a pending output has the whole gradient. What is no batch enters a loss of each rank: those
    losses are one loss, their mean. A scalar made of the batch is taken for the loss itself.
    """
    ends = returned(gm)
    out, tangents = dict[int, Spec](), dict[int, Spec]()
    for i, (node, entry) in enumerate(zip(ends, ctx.signature.outputs, strict=True)):
        if entry.same is not None:
            _check_same(ends[entry.same], entry, ctx)
        if entry.kind is not OutputKind.OUTPUT or not isinstance(node, Node):
            continue
        is_told = of_data(shape(node)) or told("out", entry.name, node, ctx.plan) is not None
        shown = None if is_told else batch
        rows = 0 if shown is None else shown.rows_of(node)
        lengths = {} if batch is None else {a: batch.length_of(node, a) for a in ctx.plan.sequence}
        layout = output_layout(node, entry.name, ctx.plan, rows, lengths)
        if of_data(shape(node)):
            if ctx.plan.calls.given("out", entry.name, len(shape(node))):
                raise _by_data(f"output {entry.name or i}", node)
            layout = {}
        out[i] = _placed(node, layout, ctx, f"output {entry.name or i}")
        tangents[i] = Spec(out[i].dims)
        if batch is not None and (shape(node) or not batch.depends(node)):
            given = ctx.plan.calls.given("out", entry.name, len(shape(node))) is not None
            free = [] if shown is None or rows is not None else [a for a in ctx.plan.batch_axes if a not in layout]
            free += [] if given else [a for a in ctx.plan.sequence if a not in layout]
            tangents[i] = tangents[i].with_pending(dict.fromkeys(free, "sum"), ctx.mesh)
    return out, tangents


def _check_same(node: Node, entry: Output, ctx: Context) -> None:
    first = ctx.signature.outputs[entry.same or 0]
    if output_layout(node, entry.name, ctx.plan) != output_layout(node, first.name, ctx.plan):
        raise PlanError(
            f"{entry.name} and {first.name} are one tensor, and asked for in two layouts", help="return a clone of it"
        )


def _fix_outputs(gm: GraphModule, outputs: dict[int, Spec], ctx: Context) -> None:
    """Every returned value leaves in its own layout: a reshard, or for gradients a mark that fixes mesh dims."""
    end, ends, inputs = output_node(gm), returned(gm), placeholders(gm)
    for i, entry in enumerate(ctx.signature.outputs):
        node = ends[i]
        if not isinstance(node, Node):
            continue
        with gm.graph.inserting_before(end):
            if entry.kind is OutputKind.OUTPUT:
                ends[i] = emit(reshard, (node, outputs[i]), node, why="the layout of an output")
                continue
            source = ctx.signature.inputs[entry.of or 0]
            if entry.kind is OutputKind.MUTATION or source.kind is not InputKind.PARAMETER:
                target = Spec(spec(inputs[entry.of or 0]).dims)  # ... and so does each summand of a pending input
                ends[i] = emit(reshard, (node, target), node, why=f"the layout of {source.name}")
            else:
                ends[i] = _gradient(node, source, ctx)
    end.args = (tuple(ends),)


def _gradient(node: Node, source: Input, ctx: Context) -> Node:
    """A parameter's gradient in the parameter's stored layout; left pending where no reduction is wanted."""
    layout = ctx.plan.params[source.name]
    kept = ctx.plan.data_axes if source.name in ctx.keep else layout.local
    target = UnlessPending(layout.stored, tuple(a for a in ctx.mesh.names if a in kept))
    wish = ("", target, False, f"gradient of {source.name}")
    key = f"|gradient|{source.name}|"
    return emit(MARK, (node, key), node, value=val(node), wish=(wish,), unit=layout.gather_unit)


def _narrowed(node: Node) -> Node:
    """What a parameter is gathered as: its cast to a narrower dtype, where that is its only use."""
    if len(node.users) == 1:
        (user,) = node.users
        if user.target is CAST and nbytes(user) < nbytes(node):
            return user
    return node


def _compute_layout(node: Node, fqn: str, ctx: Context) -> int:
    """The gather of a parameter stored in one layout and computed with in another."""
    layout = ctx.plan.params[fqn]
    if layout.stored == layout.compute:
        return 0
    node = _narrowed(node)
    users = [u for u in node.users if u.op != "output"]
    if not users:
        return 0
    with node.graph.inserting_before(min(users)):
        gather = emit(
            reshard, (node, layout.compute), node, phase="forward", regather=layout.kept != layout.compute,
            unit=layout.gather_unit, why=layout.why,
        )  # fmt: skip
        if layout.kept not in (layout.compute, layout.stored):
            of(gather).kept = layout.kept
    redirect(users, node, gather)
    return 1
