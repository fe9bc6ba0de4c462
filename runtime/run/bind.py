"""A program becomes one rank's: sizes become its numbers, collectives become calls on its process groups.

    %view: f32[8@dp, 4@tp, 16] = aten.view(%mm, [8@dp, 4@tp, 16])        view = aten.view(mm, [4, 2, 16])
    %all_gather: f32[8@dp, 64] = shardc.all_gather(%x, 1, tp)       ==>  all_gather = AllGather(...)(x)

The result is a plain function of local tensors: it knows no layout and no mesh.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.collectives import Cut, cut_of
from shardc.compiler.ir.moves import divides_a_sum, move_of
from shardc.compiler.ir.node import spec
from shardc.compiler.ir.owned import own
from shardc.compiler.ir.rewrite import inherit
from shardc.compiler.ir.routes import cuts_of
from shardc.compiler.ir.views import outlives
from shardc.compiler.spec.mesh import Mesh, place
from shardc.compiler.spec.rank_numbers import bind
from shardc.runtime.run.direct_calls import direct
from shardc.runtime.wire.handshake import Calls
from shardc.runtime.wire.line import Line
from shardc.runtime.wire.wire import AllGather, AllReduce, AllToAll, Fetch, ReduceScatter

aten = torch.ops.aten
Bound = tuple[Callable[..., Tensor], tuple]  # what to call, and with what beside the operand
KEPT = ("where", "path", "phase", "made_by", "data")  # small texts; values and layouts stay behind


def bind_program(
    gm: GraphModule,
    mesh: Mesh,
    coords: Mapping[str, int],
    groups: Mapping[str, ProcessGroup],
    calls: Calls | None = None,
    reuse: bool = True,
    apart: Mapping[int, Sequence[Node]] = MappingProxyType({}),
) -> GraphModule:
    """A LOCAL or SCHEDULED program as the rank at `coords` runs it: local tensors in, local tensors out.

    groups: this rank's process group along each mesh dim that has more than one rank. calls: see `wire.Line`.
    reuse: whether dead operands may be reduced where they lie; not where others decide what shares memory.
    apart: of what is returned, what is to be `own`, and from what.
    Nodes keep their names. No gradient flows through collectives.
    Raises ValueError for a call that has no place in such a program.
    """
    moved = [move.axis for node in gm.graph.nodes if (move := move_of(node)) is not None]
    names = dict.fromkeys([*mesh.names, *moved])  # parts of mesh dims too
    lines = {a: Line(a, mesh[a], place(coords, a), groups.get(a), calls) for a in names}
    return _Binder(gm, mesh, coords, lines, reuse).bound(apart)


class _Binder:
    def __init__(
        self, gm: GraphModule, mesh: Mesh, coords: Mapping[str, int], lines: Mapping[str, Line], reuse: bool = True
    ) -> None:
        self.reuse = reuse
        self.gm, self.mesh, self.coords, self.lines = gm, mesh, dict(coords), lines
        self.graph = Graph()
        self.env: dict[Node, Node] = {}
        self.started: dict[Node, Any] = {}  # the collective behind each start
        self.divided: set[Node] = set()  # divisions that a joint reduction makes at once

    def bound(self, apart: Mapping[int, Sequence[Node]]) -> GraphModule:
        for node in self.gm.graph.nodes:
            target, args, kwargs = self._here(node)
            if node.op == "output":
                args = (tuple(self._owned(x, apart.get(i)) for i, x in enumerate(args[0])),)
            here = self.graph.create_node(node.op, target, args, kwargs, node.name)
            inherit(here, node, KEPT)
            self.env[node] = here
        self.graph.lint()
        return GraphModule(self.gm, self.graph, class_name="RankProgram")

    def _owned(self, x: Any, others: Sequence[Node] | None) -> Any:
        return x if others is None else self.graph.call_function(own, (x, *map(self.env.__getitem__, others)))

    def _here(self, node: Node) -> tuple[Any, tuple, dict[str, Any]]:
        """(target, args, kwargs) of the node on this rank."""
        if node.target in MOVES:
            options = {k: v for k, v in node.kwargs.items() if k != "reuse"}
            x, *rest = inspect.signature(node.target).bind(*node.args, **options).arguments.values()  # pyright: ignore
            target, args = MOVES[node.target](self, node, x, *rest)
            return target, (self.env[x] if isinstance(x, Node) else self._several(node, x, target), *args), {}
        if node.target in c.SYMBOLIC or node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise ValueError(f"%{node.name}: {node.op} of {node.target} has no place in a local program")
        args, kwargs = bind((tuple(node.args), dict(node.kwargs)), self.mesh, self.coords, self._leaf)
        if self.reuse and divides_a_sum(node, self.mesh):
            return (given if node in self.divided else torch.Tensor.div_), args, kwargs
        return direct(node.target, args, kwargs), args, kwargs

    def _several(self, node: Node, values: Sequence[Node], target: Any) -> Any:
        """Values that move together. Summands are laid out by a call of its own: they need not live until they are
        gone."""
        here = [self.env[value] for value in values]
        collective = self.started.get(node, target)
        if isinstance(collective, AllGather):
            return here
        laid = self.graph.call_function(collective.lay, (here,))
        inherit(laid, node, KEPT)
        return laid

    def _leaf(self, leaf: Any) -> Any:
        return self.env[leaf] if isinstance(leaf, Node) else leaf

    def all_reduce(self, node: Node, x: Any, axis: str, op: str = "sum") -> Bound:
        reuse = self.reuse and bool(node.kwargs.get("reuse"))
        return AllReduce(op, self.lines[axis], f"%{node.name}", reuse, self._divisor(node)), ()

    def all_gather(self, node: Node, x: Any, dim: Any, axis: str) -> Bound:
        return AllGather(*self._cuts(node), self.lines[axis], f"%{node.name}"), ()

    def reduce_scatter(self, node: Node, x: Any, dim: Any, axis: str, op: str = "sum") -> Bound:
        return ReduceScatter(*self._cuts(node), op, self.lines[axis], f"%{node.name}", self._divisor(node)), ()

    def _divisor(self, node: Node) -> float | None:
        """By what all that a joint reduction gives is divided, each where it lies; None where they differ."""
        if isinstance(node.args[0], Node):
            return None
        arrived = next(iter(node.users)) if node.target is c.start else node
        divisions = [user for item in arrived.users for user in item.users]
        if not self.reuse or not all(divides_a_sum(n, self.mesh) for n in divisions):
            return None
        numbers = [n.args[1] for n in divisions]
        if numbers != numbers[:1] * len(node.args[0]):  # pyright: ignore[reportArgumentType]
            return None
        self.divided.update(divisions)
        return numbers[0]  # pyright: ignore[reportReturnType]

    def all_to_all(self, node: Node, x: Node, source: int, dim: int, axis: str) -> Bound:
        before = spec(x)
        (send,), (shape,) = self._cuts(node)
        receive = cut_of(before, source, axis, self.mesh, self.coords, spec(node))
        line = self.lines[axis]
        along = [{**self.coords, axis: i} for i in range(line.size)]
        moves = any(math.prod(before.local_shape(self.mesh, at)) for at in along)
        return AllToAll(send, receive, shape, moves, line, f"%{node.name}"), ()

    def fetch(
        self, node: Node, x: Node, dim: int, axis: str, held: Sequence[int], wanted: Sequence[c.Runs], *fill: float
    ) -> Bound:
        return Fetch(dim, held, wanted, self.lines[axis], f"%{node.name}", *fill), ()

    def local_slice(self, node: Node, x: Node, dim: int, axis: str) -> Bound:
        cut = cut_of(spec(node), dim, axis, self.mesh, self.coords, spec(node))
        index = place(self.coords, axis)
        start = sum(cut.sizes[:index])
        taken = copied if outlives(node) else piece
        return taken, (list(cut.view), cut.dim, start, cut.sizes[index], list(self._shape(node)))

    def make_partial(self, node: Node, x: Node, axis: str) -> Bound:
        return aten.zeros_like.default if self.coords[axis] else aten.alias.default, ()

    def start(self, node: Node, x: Node, kind: str, args: tuple) -> Bound:
        self.started[node], rest = MOVES[c.NAMED[kind]](self, node, x, *args)
        return self.started[node].start, rest

    def wait(self, node: Node, x: Node) -> Bound:
        return self.started[x].wait, ()

    def _cuts(self, node: Node) -> tuple[list[Cut], list[tuple[int, ...]]]:
        """How each value that moves here is dealt, and the shape of what this rank gets of it."""
        move = move_of(node)
        assert move is not None
        shapes = [part.after.local_shape(self.mesh, self.coords) for part in move.each()]
        return cuts_of(move, self.mesh, self.coords), shapes

    def _shape(self, node: Node) -> tuple[int, ...]:
        return spec(node).local_shape(self.mesh, self.coords)


MOVES: dict[Any, Callable[..., Bound]] = {
    c.all_reduce: _Binder.all_reduce,
    c.all_gather: _Binder.all_gather,
    c.reduce_scatter: _Binder.reduce_scatter,
    c.all_to_all: _Binder.all_to_all,
    c.fetch: _Binder.fetch,
    c.local_slice: _Binder.local_slice,
    c.make_partial: _Binder.make_partial,
    c.start: _Binder.start,
    c.wait: _Binder.wait,
}


def given(x: Tensor, divisor: float) -> Tensor:
    """A division that is made already."""
    return x


def piece(x: Tensor, view: Sequence[int], dim: int, start: int, length: int, shape: Sequence[int]) -> Tensor:
    """A stretch of one dim of `x` seen as `view`, as a tensor of `shape`. Contiguous, as the result of a
    collective is: what follows was traced on the whole value and may take a view of it."""
    return x.reshape(view).narrow(dim, start, length).reshape(shape).contiguous()


def copied(x: Tensor, *args: Any) -> Tensor:
    """`piece`, in memory of its own: the whole is freed before it."""
    taken = piece(x, *args)
    return taken.clone() if taken.untyped_storage()._cdata == x.untyped_storage()._cdata else taken
