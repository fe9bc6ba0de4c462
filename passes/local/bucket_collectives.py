"""Few large gradient reductions instead of many small ones, each as soon as its gradients are there.

    %mm: f32[8, 16]+dp = aten.mm(%t, %tangent)
    %mm_1: f32[4, 8]+dp = aten.mm(%t_1, %mm_2)
    %all_reduce: f32[8, 16] = shardc.all_reduce(%mm, dp)
    %div: f32[8, 16] = aten.div.Tensor(%all_reduce, 2)
    %all_reduce_1: f32[4, 8] = shardc.all_reduce(%mm_1, dp)
    %div_1: f32[4, 8] = aten.div.Tensor(%all_reduce_1, 2)
  ==>
    %bucket: f32[160] = shardc.bucket([%mm, %mm_1])
    %all_reduce_2: f32[160] = shardc.all_reduce(%bucket, dp)
    %div_2: f32[160] = aten.div.Tensor(%all_reduce_2, 2)
    %unbucket: (f32[8, 16], f32[4, 8]) = shardc.unbucket(%div_2, [[8, 16], [4, 8]])

Buckets fill in the order in which gradients become ready, up to the plan's `bucket_mb`. Where the plan says
`reduce_dtype`, what travels is cast before and cast back after, in a bucket or alone. Left alone: what is
not the last step of a parameter's gradient, reductions over no data-parallel mesh dim or over one rank, and
a gradient that finds no other of its dtype and mesh dims, is as large as a bucket, or so large that copying it
costs more than a collective of its own.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir.collectives import all_reduce, bucket, reduce_scatter, unbucket
from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.node import local_nbytes, spec, tensors
from shardc.compiler.ir.signature import InputKind, OutputKind
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.rank_numbers import local_size
from shardc.compiler.spec.ways import worth_a_message

aten = torch.ops.aten
DIVIDE = aten.div.Tensor
DEFAULT = 25 * 2**20  # bytes, as in DistributedDataParallel


@dataclass(frozen=True)
class Tail:
    """The last steps of one parameter's gradient, in order: pieces are scattered, sums reduced, averages taken."""

    name: str  # of the parameter
    scatters: tuple[Node, ...]  # up to the last reduce_scatter
    reductions: tuple[Node, ...]  # the all_reduces behind them
    divisions: tuple[Node, ...]

    @property
    def moves(self) -> tuple[Node, ...]:
        return (*self.scatters, *self.reductions)

    @property
    def computed(self) -> Node:
        """The gradient before any of these."""
        return self.moves[0].args[0]  # pyright: ignore[reportReturnType]

    @property
    def source(self) -> Node:
        """What the all_reduces reduce."""
        return (self.computed, *self.scatters)[-1]

    @property
    def end(self) -> Node:
        return (*self.moves, *self.divisions)[-1]


@dataclass(frozen=True)
class BucketCollectives:
    name = "bucket-collectives"
    takes = gives = Stage.LOCAL
    exact = False  # a backend may add the elements of one large tensor in another order

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes, bucketed = Counter(), set()
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        tails = sorted(_tails(gm, ctx), key=lambda tail: order[tail.computed])
        for tail in tails:
            _follow(tail.computed, tail.moves)
        for members in _filled(tails, ctx):
            if len(members) > 1:
                _as_one(members, ctx)
                changes["buckets"] += 1
                changes["bucketed"] += len(members)
                bucketed.update(members)
        for tail in tails:
            alone = tail.scatters if tail in bucketed else tail.moves
            changes["cast"] += _cast_alone(tail, alone, ctx)
        return PassResult(changes)


def _tails(gm: GraphModule, ctx: Context) -> Iterator[Tail]:
    seen: set[Node] = set()
    for entry, node in zip(ctx.signature.outputs, returned(gm), strict=True):
        source = ctx.signature.inputs[entry.of] if entry.of is not None else None
        if entry.kind is not OutputKind.GRADIENT or source is None or source.kind is not InputKind.PARAMETER:
            continue
        if not isinstance(node, Node) or node in seen or node.meta.get("phase") != "backward":
            continue
        seen.add(node)
        divisions = _run_before(node, lambda n: n.target is DIVIDE and not isinstance(n.args[1], Node))
        first = divisions[0].args[0] if divisions else node
        moves = _run_before(first, lambda n: n.target in (all_reduce, reduce_scatter))
        axes = [_axis(n) for n in moves]
        if any(a in ctx.plan.data_axes for a in axes) and math.prod(ctx.mesh[a] for a in axes) > 1:
            cut = max((i + 1 for i, n in enumerate(moves) if n.target is reduce_scatter), default=0)
            yield Tail(source.name, tuple(moves[:cut]), tuple(moves[cut:]), tuple(divisions))


def _run_before(node: Any, accepts: Callable[[Node], bool]) -> list[Node]:
    """The run of accepted nodes that ends in `node`, each of one use only."""
    found: list[Node] = []
    while accepts(node) and len(node.users) == 1:
        found.insert(0, node)
        node = node.args[0]
    return found


def _axis(node: Node) -> str:
    return next(a for a in node.args[1:] if isinstance(a, str))


def _follow(value: Node, steps: Sequence[Node]) -> None:
    """Move the steps to where their operand becomes ready."""
    at = _behind(value)
    for step in steps:
        at.append(step)
        at = step


def _behind(value: Node) -> Node:
    """The node behind which uses of a value may stand."""
    inputs = [n for n in value.graph.nodes if n.op == "placeholder"]
    return inputs[-1] if value in inputs else value


def _filled(tails: Sequence[Tail], ctx: Context) -> Iterable[list[Tail]]:
    """Tails grouped by how they are reduced, and cut into runs of at most a bucket's bytes, in order."""
    runs: dict[Any, list[list[Tail]]] = {}
    for tail in tails:
        if not tail.reductions:
            continue
        value = tensors(tail.source)[0]
        key = (*((n.target, *n.args[1:]) for n in tail.reductions), value.dtype, value.device)
        limit = min(ctx.plan.bucket_bytes.get(_axis(n), DEFAULT) for n in tail.reductions)
        nbytes = local_nbytes(tail.source, ctx.mesh)
        if nbytes >= worth_a_message(value.device):
            continue
        mine = runs.setdefault(key, [[]])
        held = sum(local_nbytes(t.source, ctx.mesh) for t in mine[-1])
        if held and held + nbytes > limit:
            mine.append([])
        mine[-1].append(tail)
    return [run for mine in runs.values() for run in mine]


def _as_one(members: Sequence[Tail], ctx: Context) -> None:
    """Reduce the members' gradients as one flat tensor, and give each back in its own shape."""
    graph = members[0].end.graph
    sources = [tail.source for tail in members]
    order = {node: i for i, node in enumerate(graph.nodes)}
    pieces = [_local_piece(n, ctx) for n in sources]
    meta = {"phase": "backward", "why": f"gradients of {_listed([tail.name for tail in members])}"}
    with graph.inserting_before(_behind(max(sources, key=order.__getitem__)).next):
        flat = _call(graph, bucket, (sources,), {**meta, "local": bucket(pieces)})
        flat = _reduced(flat, members[0].reductions, ctx)
    with graph.inserting_before(graph.output_node()):
        flat = _cast(flat, pieces[0].dtype)
        by = {tuple(n.args[1] for n in tail.divisions) for tail in members}
        shared = by.pop() if len(by) == 1 else None
        for number in shared or ():
            flat = _call(graph, DIVIDE, (flat, number), flat.meta)
        sizes = [[local_size(dim) for dim in spec(tail.end).dims] for tail in members]
        views = _call(graph, unbucket, (flat, sizes), {**flat.meta, "local": pieces})
        for i, tail in enumerate(members):
            _give_back(tail, views, i, shared is not None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 5 else f"{names[0]} to {names[-1]}, {len(names)} parameters"


def _local_piece(node: Node, ctx: Context) -> torch.Tensor:
    """What rank 0 holds of a value, as a tensor on meta."""
    shape = spec(node).local_shape(ctx.mesh, ctx.mesh.coords(0))
    return torch.empty(shape, dtype=tensors(node)[0].dtype, device="meta")


def _give_back(tail: Tail, views: Node, i: int, divided: bool) -> None:
    """The i-th view in place of the gradient, which `divided` says has been averaged in the bucket already."""
    graph = views.graph
    done = tail.end if divided else tail.reductions[-1]
    wire = {k: views.meta[k] for k in ("wire",) if k in views.meta}
    done.replace_all_uses_with(_call(graph, operator.getitem, (views, i), {**done.meta, **wire, "origin": done.name}))
    for step in () if divided else tail.divisions:
        graph.output_node().prepend(step)
        step.meta |= wire
    for step in reversed((*tail.reductions, *(tail.divisions if divided else ()))):
        graph.erase_node(step)


def _cast_alone(tail: Tail, steps: Sequence[Node], ctx: Context) -> bool:
    """Let what is reduced outside buckets travel in the plan's dtype."""
    if not steps:
        return False
    own = tensors(tail.computed)[0].dtype
    if all(_wire(step, own, ctx) is own for step in steps):
        return False
    graph, last = tail.computed.graph, steps[-1]
    with graph.inserting_before(steps[0]):
        value = _reduced(tail.computed, steps, ctx)
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_before(min(last.users, key=order.__getitem__)):
        back = _cast(value, own)
    back.meta |= {"val": last.meta["val"], "origin": last.name}
    last.replace_all_uses_with(back)
    for step in reversed(steps):
        graph.erase_node(step)
    for step in tail.divisions:
        step.meta["wire"] = back.meta["wire"]
    return True


def _wire(step: Node, own: torch.dtype, ctx: Context) -> torch.dtype:
    """In which dtype a reduction's operand travels."""
    return ctx.plan.wire_dtype(step.args[1:], own)


def _reduced(value: Node, steps: Sequence[Node], ctx: Context) -> Node:
    """The value put through such reductions, each in the dtype in which it travels."""
    own = _tensor(value).dtype
    for step in steps:
        wire = _wire(step, own, ctx)
        value = _cast(value, wire)
        meta = {**step.meta, "val": tensors(step)[0].to(wire)} if "spec" in value.meta else value.meta
        value = _call(value.graph, step.target, (value, *step.args[1:]), meta)
    return value


def _cast(value: Node, dtype: torch.dtype) -> Node:
    if _tensor(value).dtype is dtype:
        return value
    meta = {**value.meta, "wire": _tensor(value).dtype}
    meta |= {k: meta[k].to(dtype) for k in ("val", "local") if isinstance(meta.get(k), torch.Tensor)}
    node = _call(value.graph, aten._to_copy.default, (value,), meta)
    node.kwargs = {"dtype": dtype}
    return node


def _tensor(node: Node) -> torch.Tensor:
    return (tensors(node) or [node.meta["local"]])[0]


def _call(graph: Graph, target: Any, args: tuple, meta: dict[str, Any]) -> Node:
    node = graph.call_function(target, args)
    node.meta = {k: v for k, v in meta.items() if k not in ("made_by", "rule", "wants")}
    return node
