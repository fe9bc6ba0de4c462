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
from shardc.compiler.infer.root_layouts import input_layout, output_layout
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.graph import call_nodes, inputs_of, output_node, placeholders, returned
from shardc.compiler.ir.marks import CONSTRAIN, MARK, MarkKey, UnlessPending, parse_key
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
        for entry, node in inputs_of(gm, ctx.signature):
            set_spec(node, _input_spec(node, entry, ctx))
            of(node).why = _reason(entry, ctx)
        outputs = _output_specs(gm, ctx)
        for entry, node in inputs_of(gm, ctx.signature, InputKind.TANGENT):
            set_spec(node, Spec(outputs[entry.of or 0].dims))  # each rank's summand of a pending output has all of it
        _fix_outputs(gm, outputs, ctx)
        for entry, node in inputs_of(gm, ctx.signature, InputKind.PARAMETER):
            changes["gathers"] += _compute_layout(node, entry.name, ctx)
        return PassResult(changes)


def _wish(mark: Node, ctx: Context) -> bool:
    """What the plan or the user's `constrain` says of a mark: (mesh dim, placement, open, reason) entries."""
    text: str = arguments(mark)[1]
    key = parse_key(text)
    if key.grad:
        return False
    if key.kind == CONSTRAIN:
        try:
            layout = ctx.plan.constraint(key.text)
        except PlanError as error:
            raise error.at(of(mark).where) from None
        wishes = tuple((axis, p, False, "constrain") for axis, p in layout.items())
        if of(mark).data and any(p != REPLICATE for p in layout.values()):
            raise _by_data("the value given to constrain", mark)
    else:
        said = ctx.plan.at(text)
        wishes = tuple((b.axis, b.desired, b.open, b.key) for b in said if b.desired is not None)
    for axis, placement, _, said in wishes:
        _fits(mark, key, axis, placement, said, ctx)
    of(mark).wish = wishes
    return bool(wishes)


def _fits(mark: Node, key: MarkKey, axis: str, placement: Any, said: str, ctx: Context) -> None:
    try:
        Spec.whole(shape(mark)).place(axis, placement, ctx.mesh)
    except ValueError as error:
        place = {"in": "what enters", "out": "what leaves"}.get(key.kind)
        what = f"{place} {key.fqn or 'the model'}" if place else "the value given to constrain"
        raise PlanError(
            f"{what} has shape {shape(mark)}: {error}",
            where=of(mark).where,
            excerpt=said if place else "",
            help="name a dim that the tensor has",
        ) from None


def _by_data(what: str, node: Node) -> PlanError:
    return PlanError(
        f"{what} has shape {list(shape(node))}, of which data decides a size: it lies whole on every rank",
        where=of(node).where,
        help="give it no layout that splits it",
    )


def _input_spec(node: Node, entry: Input, ctx: Context) -> Spec | None:
    dims = shape(node)
    if entry.kind is InputKind.PARAMETER:
        return ctx.plan.params[entry.name].stored
    if entry.kind is InputKind.BUFFER:
        layout = ctx.plan.buffers.get(entry.name)
        return layout.stored if layout is not None else Spec.whole(dims)
    if entry.kind is InputKind.CARRY:
        return ctx.carries[entry.name]
    if entry.kind is not InputKind.BATCH:
        return Spec.whole(dims)
    return _placed(dims, input_layout(node, entry.name, ctx.plan), ctx, f"input {entry.name}")


def _reason(entry: Input, ctx: Context) -> str:
    """The plan entry behind an input's layout, in words."""
    layout = ctx.plan.params.get(entry.name) if entry.kind is InputKind.PARAMETER else None
    if layout is not None:
        return "; ".join(layout.keys.values())
    given = entry.kind is InputKind.BATCH and ctx.plan.roots.says_input(entry.name)
    return "inputs=" if given else ""


def _placed(dims: tuple[int, ...], layout: Mapping[str, Any], ctx: Context, what: str) -> Spec:
    ordered = {axis: layout[axis] for axis in ctx.mesh.names if axis in layout}
    try:
        return from_placements(dims, ordered, ctx.mesh)
    except ValueError as error:
        raise PlanError(f"{what} has shape {dims}: {error}", help="name a dim that the tensor has") from None


def _output_specs(gm: GraphModule, ctx: Context) -> dict[int, Spec]:
    """The layout each user output leaves with, by position among the outputs."""
    ends = returned(gm)
    out: dict[int, Spec] = {}
    for i, (node, entry) in enumerate(zip(ends, ctx.signature.outputs, strict=True)):
        if entry.same is not None:
            _check_same(ends[entry.same], entry, ctx)
        if entry.kind is not OutputKind.OUTPUT or not isinstance(node, Node):
            continue
        layout = output_layout(node, entry, ctx.plan)
        if of_data(shape(node)):
            if ctx.plan.roots.says_output(entry.name) and layout:
                raise _by_data(f"output {entry.name or i}", node)
            layout = {}
        out[i] = _placed(shape(node), layout, ctx, f"output {entry.name or i}")
    return out


def _check_same(node: Node, entry: Output, ctx: Context) -> None:
    first = ctx.signature.outputs[entry.same or 0]
    if output_layout(node, entry, ctx.plan) != output_layout(node, first, ctx.plan):
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
            unit=layout.gather_unit, why="; ".join(layout.keys.values()),
        )  # fmt: skip
        if layout.kept not in (layout.compute, layout.stored):
            of(gather).kept = layout.kept
    redirect(users, node, gather)
    return 1
