"""Values that move to the same ranks at the same time move in one message.

    %all_gather: f32[16, 8] = shardc.all_gather(%w, 0, dp)
    ...
    %all_gather_1: f32[16] = shardc.all_gather(%b, 0, dp)
  ==>
    %all_gather_2: (f32[16, 8], f32[16]) = shardc.all_gather([%w, %b], [0, 0], dp)
    %getitem: f32[16, 8] = getitem(%all_gather_2, 0)
    %getitem_1: f32[16] = getitem(%all_gather_2, 1)

What a unit gathers moves at once, where the first of its values is needed, and so do its gradients that are scattered,
where the last of them is ready. Gradients that are reduced whole move together in the order in which they become
ready, up to the plan's `bucket_mb`. What is made of a reduced gradient waits until the end, and gradients travel in
the plan's `reduce_dtype`, together or alone.

Left alone: collectives of other mesh dims, dtypes or halves, or over one rank; those of which one is made from another;
a gather of what is computed; a reduction that serves no unit and is not the last step of a parameter's gradient, or
over no data-parallel mesh dim; and a gradient that is as large as a bucket, or so large that copying it costs more than
a message.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import all_gather, all_reduce, reduce_scatter
from shardc.compiler.ir.graph import call_nodes, made_of, results_of, settle
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import local_nbytes, of, set_specs, spec, tensors
from shardc.compiler.ir.rewrite import cast, emit
from shardc.compiler.ir.signature import InputKind, OutputKind
from shardc.compiler.ir.views import is_kept
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.cost import worth_a_message

aten = torch.ops.aten
BUCKET = 25 * 2**20  # bytes, as in DistributedDataParallel
SHOWN = 3  # reasons that a message names


@dataclass(frozen=True)
class JoinMessages:
    name = "join-messages"
    takes = gives = Stage.LOCAL
    exact = False  # gradients may travel in another dtype, and a backend may add them in another order

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for members in _of_units(gm, all_gather, ctx):
            _gather(members)
            changes["all_gather"] += 1
        for members in _of_units(gm, reduce_scatter, ctx):
            _reduce(members, ctx)
            changes["reduce_scatter"] += 1
        tails = _tails(gm, ctx)
        for tail in tails:
            for step in tail.scatters:
                _reduce([step], ctx, waits=step is tail.steps[-1])
        for members in _buckets(tails, ctx):
            for steps in zip(*(tail.reductions for tail in members), strict=True):
                _reduce(steps, ctx, waits=steps[0] is members[0].steps[-1])
            changes["all_reduce"] += len(members) > 1
        settle(gm.graph)
        return PassResult(changes)


def _of_units(gm: GraphModule, kind: Any, ctx: Context) -> Iterator[list[Node]]:
    """Collectives of a kind that may move together, in graph order; two of them at least."""
    found: dict[Any, list[Node]] = {}
    for node in call_nodes(gm, kind):
        value, _, axis, *rest = node.args
        if of(node).unit is None or ctx.mesh[str(axis)] == 1 or not isinstance(value, Node):
            continue
        if kind is all_gather and not _is_given(value, node):
            continue
        like = tensors(value)[0]
        where = (of(node).unit, of(node).phase, of(node).region)
        found.setdefault((axis, *rest, like.dtype, like.device, *where), []).append(node)
    for members in found.values():
        if len(members) > 1 and made_of(members).keys().isdisjoint(members):
            yield members


def _is_given(value: Node, gather: Node) -> bool:
    """Whether a value is there before anything of its half is computed: an input, a cast of one, or what was kept."""
    if value.target is aten._to_copy.default:
        value = value.all_input_nodes[0]
    return value.op == "placeholder" or (is_kept(value) and of(value).phase != of(gather).phase)


@dataclass(frozen=True)
class Tail:
    """The last steps of one parameter's gradient, in order: it is scattered, then its pieces are reduced."""

    scatters: tuple[Node, ...]  # up to the last reduce_scatter
    reductions: tuple[Node, ...]  # the all_reduces behind them

    @property
    def steps(self) -> tuple[Node, ...]:
        return (*self.scatters, *self.reductions)

    @property
    def reduced(self) -> Node:
        """What the first all_reduce reduces."""
        return self.reductions[0].all_input_nodes[0]


def _tails(gm: GraphModule, ctx: Context) -> list[Tail]:
    """In the order in which the gradients become ready."""
    found: dict[Node, Tail] = {}
    for entry, end in results_of(gm, ctx.signature, OutputKind.GRADIENT):
        of_parameter = ctx.signature.inputs[entry.of or 0].kind is InputKind.PARAMETER
        if not of_parameter or end in found or of(end).phase != "backward":
            continue
        first, _ = _run_before(end, lambda n: n.target is aten.div.Tensor and not isinstance(n.args[1], Node))
        _, steps = _run_before(first, lambda n: n.target in (all_reduce, reduce_scatter))
        axes = [_axis(n) for n in steps]
        if any(a in ctx.plan.data_axes for a in axes) and math.prod(ctx.mesh[a] for a in axes) > 1:
            cut = max((i + 1 for i, n in enumerate(steps) if n.target is reduce_scatter), default=0)
            found[end] = Tail(tuple(steps[:cut]), tuple(steps[cut:]))
    return sorted(found.values(), key=lambda tail: tail.steps[0].all_input_nodes[0])


def _run_before(node: Node, accepts: Callable[[Node], bool]) -> tuple[Node, list[Node]]:
    """The run of accepted nodes that ends in `node`, each of one use only; and what it begins with."""
    found: list[Node] = []
    while accepts(node) and len(node.users) == 1:
        found.insert(0, node)
        node = node.all_input_nodes[0]
    return node, found


def _axis(node: Node) -> str:
    move = move_of(node)
    assert move is not None
    return move.axis


def _buckets(tails: Sequence[Tail], ctx: Context) -> list[list[Tail]]:
    """Tails grouped by how they are reduced, and cut into runs of at most a bucket's bytes, in order."""
    runs: dict[Any, list[list[Tail]]] = {}
    for tail in tails:
        if not tail.reductions:
            continue
        value, nbytes = tensors(tail.reduced)[0], local_nbytes(tail.reduced, ctx.mesh)
        limit = min(ctx.plan.bucket_bytes.get(_axis(n), BUCKET) for n in tail.reductions)
        alone = nbytes >= worth_a_message(value.device)
        how = (*((n.target, *n.args[1:]) for n in tail.reductions), value.dtype, value.device)
        mine = runs.setdefault(tail if alone else how, [[]])
        held = sum(local_nbytes(t.reduced, ctx.mesh) for t in mine[-1])
        if held and held + nbytes > limit:
            mine.append([])
        mine[-1].append(tail)
    return [run for mine in runs.values() for run in mine]


def _gather(members: Sequence[Node]) -> None:
    first, values = members[0], [node.all_input_nodes[0] for node in members]
    for value in values:
        if value > first:
            first.prepend(value)
    with first.graph.inserting_before(first):
        _give_back(_message(members, values), members)


def _reduce(members: Sequence[Node], ctx: Context, waits: bool = True) -> None:
    """Reduce as soon as the last operand is ready, in the plan's dtype. waits: whether what is made of it does."""
    graph, values = members[0].graph, [node.all_input_nodes[0] for node in members]
    end, made, last = graph.output_node(), sorted(made_of(members)), max(values)
    wire = ctx.plan.wire_dtype(members[0].args[1:], tensors(values[0])[0].dtype)
    if wire is not tensors(values[0])[0].dtype:
        for node in made:
            of(node).wire = wire
    for node in made if waits else ():
        end.prepend(node)
    ready = last
    while ready.next.op == "placeholder":
        ready = ready.next
    with graph.inserting_before(ready.next):
        sent = [cast(value, wire) for value in values]
        if len(members) == 1 and sent == values:
            ready.append(members[0])
            return
        message = _message(members, sent)
    with graph.inserting_before((made[0] if made else end) if waits else message.next):
        _give_back(message, members)


def _message(members: Sequence[Node], values: Sequence[Node]) -> Node:
    """The collective that moves these values, in the dtype that they have."""
    first, rest = members[0], members[0].args[1:]
    found = tuple(tensors(n)[0].to(tensors(v)[0].dtype) for n, v in zip(members, values, strict=True))
    if len(members) == 1:
        said: dict[str, Any] = {"origin": first.name, "why": of(first).why}
        return emit(first.target, (values[0], *rest), first, value=found[0], layout=spec(first), **said)
    if first.target is not all_reduce:
        rest = ([node.args[1] for node in members], *rest[1:])
    whys = list(dict.fromkeys(of(node).why for node in members if of(node).why))
    why = "; ".join(whys[:SHOWN]) + (f" and {len(whys) - SHOWN} more" if len(whys) > SHOWN else "")
    unit = (of(first).unit or "").split(" ")[0]
    message = emit(first.target, (list(values), *rest), first, value=found, path=unit, why=why)
    set_specs(message, tuple(spec(node) for node in members))
    return message


def _give_back(message: Node, members: Sequence[Node]) -> None:
    """Each value in its collective's place, in the dtype that it had."""
    for i, node in enumerate(members):
        part, own, found = message, tensors(node)[0].dtype, tensors(message)[i]
        if len(members) > 1:
            said: dict[str, Any] = {"origin": node.name, "why": of(node).why}
            part = emit(operator.getitem, (message, i), node, value=found, layout=spec(node), **said)
        if found.dtype is not own:
            of(part).wire = found.dtype
        node.replace_all_uses_with(cast(part, own))  # and the runner erases what nothing uses
