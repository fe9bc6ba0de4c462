"""What a rank holds in memory, and when: each half is run on meta tensors of the first rank's sizes.

So what is a view and what a copy is as torch decides it, by strides; a value's memory lives until the last use of
anything that shows it. What collectives need on the way is counted as the runtime takes it: what is sent, where that
is a copy, and what is received, from start to wait. Temporaries inside one operator are not seen. A size that data
decides counts as the most it can be, and what has one as memory of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import output_node, placeholders
from shardc.compiler.ir.halves import Halves
from shardc.compiler.ir.moves import Call, divides_a_sum, move_of
from shardc.compiler.ir.node import arguments, of, specs, tensors
from shardc.compiler.ir.routes import cuts_of, route_of
from shardc.compiler.ir.text import excerpt
from shardc.compiler.ir.views import Kind, outlives
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.rank_numbers import bind
from shardc.compiler.spec.sizes import DataSize, named_shape


class Life(NamedTuple):
    """A piece of memory: its bytes on the first rank, which holds most, and the steps of its half from and to which it
    lives. Step -1 is before the first node. name: of the first node that shows it."""

    name: str
    nbytes: int
    begin: int
    end: int


class Memory(NamedTuple):
    """One half over time: its nodes in order, the bytes alive while each runs, and what they are made of."""

    order: tuple[str, ...]
    start: int  # bytes of inputs and saved values, before the first node
    alive: tuple[int, ...]
    values: tuple[Life, ...]

    @property
    def peak(self) -> int:
        return max(self.start, *self.alive) if self.alive else self.start


def peak_bytes(parts: Halves, mesh: Mesh) -> int:
    """The most bytes alive at once. Parameters, buffers and the batch live throughout, the rest until last use.
    Raises ShardingError where data decides a size without a bound."""
    node = _unbounded(parts)
    if node is not None:
        raise ShardingError(
            f"%{node.name} has a size that data decides without a bound, so nobody knows its bytes",
            where=of(node).where,
            excerpt=excerpt(node),
            help="give the size as a Python number where there is one (num_classes= of one_hot)",
        )
    return max(memory.peak for memory in memories(parts, mesh).values())


def _unbounded(parts: Halves) -> Node | None:
    """The first value with a size that data decides without a bound."""
    for half in (parts.forward, parts.backward):
        for node in half.graph.nodes if half is not None else ():
            sizes = [n for x in tensors(node) for n in named_shape(x) if isinstance(n, DataSize)]
            if any(not n.bounded for n in sizes):
                return node
    return None


def memories(parts: Halves, mesh: Mesh) -> dict[str, Memory]:
    """What is alive when, in "forward" and, where there is one, in "backward"."""
    return {name: half.memory() for name, half in _halves(parts, mesh, mesh.coords(0)).items()}


def kinds_on(parts: Halves, mesh: Mesh, coords: Mapping[str, int]) -> dict[str, Kind]:
    """How the rank at `coords` holds each tensor of both halves, by name; nothing where data decides a size without a
    bound."""
    if _unbounded(parts) is not None:
        return {}
    found: dict[str, Kind] = {}
    for half in _halves(parts, mesh, coords).values():
        for node, x in half.env.items():
            if isinstance(x, Tensor):
                traced = tensors(node)  # a bucket, say, has no global value
                device = traced[0].device if traced else found[node.all_input_nodes[0].name].device
                found[node.name] = Kind(x.shape, x.stride(), x.dtype, device)
    return found


def _halves(parts: Halves, mesh: Mesh, coords: Mapping[str, int]) -> dict[str, _Half]:
    given = [(n.name, _fresh(n, mesh, coords)) for n in placeholders(parts.forward)]
    forward = _Half(parts.forward, mesh, coords, given, given)
    found = {"forward": forward}
    if parts.backward is not None:
        count = len(parts.saved)
        saved = forward.results[len(forward.results) - count :] if count else []
        late = placeholders(parts.backward)
        handed = [(n.name, _fresh(n, mesh, coords)) for n in late[count:]]
        inputs = [*zip(parts.saved, saved, strict=True), *handed]
        found["backward"] = _Half(parts.backward, mesh, coords, inputs, [*given, *handed])
    return found


class _Half:
    """One half on meta, as the rank at `coords` runs it. held: what lives throughout."""

    def __init__(
        self,
        gm: GraphModule,
        mesh: Mesh,
        coords: Mapping[str, int],
        inputs: Sequence[tuple[str, Any]],
        held: Sequence[tuple[str, Any]],
    ) -> None:
        self.nodes, self.mesh, self.coords = list(gm.graph.nodes), mesh, coords
        self.env: dict[Node, Any] = {}
        self.shown: dict[Node, list[tuple[int, int]]] = {}  # the memory behind each value
        self.known: set[int] = set()  # ... behind any so far
        self.late: set[int] = set()  # ... that is taken when the operands of its step are gone
        self.extra: list[Life] = []  # what a collective takes for one step
        for node, (_, value) in zip(placeholders(gm), inputs, strict=True):
            self._add(node, value)
        self.held = held
        for i, node in enumerate(self.nodes):
            if node.op == "call_function":
                self._add(node, self._value(node, i))
            elif node.op == "get_attr":
                self._add(node, _fresh(node, mesh, coords))
        self.results = [self.env[x] if isinstance(x, Node) else x for x in output_node(gm).args[0]]  # pyright: ignore

    def _add(self, node: Node, value: Any) -> None:
        self.env[node], self.shown[node] = value, list(_storages(value))
        self.known.update(key for key, _ in self.shown[node])

    def memory(self) -> Memory:
        last, end = self._last_uses(), len(self.nodes) - 1
        lives: dict[int, Life] = {}
        for name, value in self.held:
            for key, nbytes in _storages(value):
                lives.setdefault(key, Life(name, nbytes, -1, end))
        for i, node in enumerate(self.nodes):
            for key, nbytes in self.shown.get(node, ()):
                begin = -1 if node.op == "placeholder" else i + (key in self.late)
                lives.setdefault(key, Life(node.name, nbytes, begin, last[key]))
        values = [*lives.values(), *self.extra]
        start = sum(life.nbytes for life in values if life.begin < 0)
        steps = [0] * (len(self.nodes) + 1)
        for life in values:
            if life.begin >= 0:
                steps[life.begin] += life.nbytes
            steps[life.end + 1] -= life.nbytes
        alive = tuple(start + more for more in itertools.accumulate(steps[:-1]))
        return Memory(tuple(n.name for n in self.nodes), start, alive, tuple(values))

    def _last_uses(self) -> dict[int, int]:
        """Of each storage the last step that uses a value which shows it."""
        last: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            for used in (node, *node.all_input_nodes):
                for key, _ in self.shown.get(used, ()):
                    last[key] = i
        return last

    def _value(self, node: Node, i: int) -> Any:
        if node.target is c.wait:
            return self._arrived(node, self.env[node.args[0]], i)  # pyright: ignore
        move = move_of(node)
        if move is not None and move.target in c.COLLECTIVES:
            wire = self._wire(move, bool(node.kwargs.get("reuse")))
            if node.target is c.start:
                self.late.update(key for key, _ in _storages(wire.late))
                return wire
            lasting = self.known | {key for key, _ in _storages(wire.shown)}
            here = sum(nbytes for key, nbytes in _storages(wire.held) if key not in lasting)
            if wire.late:  # the message is laid out, then the operands are gone
                self.extra.append(Life(node.name, here, i, i))
                i, here = i + 1, here + sum(x.nbytes for x in wire.late)
            return self._arrived(node, wire._replace(extra=wire.extra + here), i)
        if move is not None and move.target is c.local_slice:
            return self._sliced(node, self.env[move.args[0]])
        if of(node).data:
            return _fresh(node, self.mesh, self.coords)
        if divides_a_sum(node, self.mesh):
            return self.env[arguments(node)[0]]
        args, kwargs = bind((tuple(node.args), dict(node.kwargs)), self.mesh, self.coords, self._leaf)
        try:
            return node.target(*args, **kwargs)  # pyright: ignore
        except NotImplementedError:  # meta has no form of it (binomial), tracing ran it on zeros: no such one is a view
            return _fresh(node, self.mesh, self.coords)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Node):
            return self.env[leaf]
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    def _sliced(self, node: Node, x: Tensor) -> Any:
        """One stretch of a dim, made contiguous: a view where it is the leading one, unless it is to be kept."""
        made = _fresh(node, self.mesh, self.coords)
        if outlives(node):
            return made
        first = x.is_contiguous() and made.shape[1:] == x.shape[1:]
        return x[: made.shape[0]] if first and x.dim() else made

    def _arrived(self, node: Node, wire: _Wire, i: int) -> Any:
        if wire.extra:
            self.extra.append(Life(node.name, wire.extra, i, i))
        made = _fresh(node, self.mesh, self.coords)
        if wire.shown is None and not wire.joint:
            return made
        sizes = [x.nbytes for x in tensors_in(made)]
        shown = _bytes(sum(sizes)) if wire.shown is None else wire.shown[: sum(sizes)]
        views = [part.view(x.dtype).view(x.shape) for part, x in zip(shown.split(sizes), tensors_in(made), strict=True)]
        return views[0] if isinstance(made, Tensor) else views

    def _wire(self, move: Call, reuse: bool) -> _Wire:
        values = [self.env[part.args[0]] for part in move.each()]
        x, several, ways, nbytes = values[0], len(values) > 1, self.mesh[move.axis], sum(v.nbytes for v in values)
        if ways == 1:
            return _Wire([], None if several else _as_bytes(x))
        if move.target is c.fetch:
            return _Wire([], extra=2 * nbytes)
        cuts = [] if move.target is c.all_reduce else cuts_of(move, self.mesh, self.mesh.coords(0))
        lies = not several and x.is_contiguous() and (move.target is c.all_gather or all(cut.leading for cut in cuts))
        route = route_of(move, cuts, nbytes, ways, x.dtype, reuse or not lies)
        sent = x if lies else _bytes(nbytes)
        received = [_bytes(route.received)] if route.received else []
        if route.shows == "sent":
            return _Wire(received, _as_bytes(sent), route.extra)
        if route.shows == "received":
            return _Wire([sent], received[0], route.extra)
        reduces = several and move.target is not c.all_gather  # its operands are laid out first
        held, late = ([sent], received) if reduces else ([sent, *received], [])
        return _Wire(held, None, route.extra, reduces and move.target is c.all_reduce, late)


class _Wire(NamedTuple):
    """A collective under way. held: memory that it takes until it is there. shown: bytes that the result is a view of;
    else it is new. extra: bytes that finishing takes besides. joint: what is new is one stretch. late: what is held
    from when the operands are gone."""

    held: list[Tensor]
    shown: Tensor | None = None
    extra: int = 0
    joint: bool = False
    late: Sequence[Tensor] = ()


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _bytes(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.uint8, device="meta")


def _fresh(node: Node, mesh: Mesh, coords: Mapping[str, int]) -> Any:
    """New memory of what a rank holds of a node."""
    values, layouts = tensors(node), specs(node)
    if layouts and len(layouts) == len(values):
        shapes = [s.local_shape(mesh, coords) for s in layouts]
    else:
        values = tensors_in(of(node).local)
        shapes = [tuple(x.shape) for x in values]
    made = [_laid(x, shape) for x, shape in zip(values, shapes, strict=True)]
    return made[0] if len(made) == 1 else made


def _laid(x: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(x.shape) == tuple(shape) and not any(s == 0 for s in x.stride()):
        return torch.empty_strided(shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.empty(tuple(shape), dtype=x.dtype, device="meta")


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """(key, bytes) of the memory behind a value; the key is good for as long as the value is kept."""
    if isinstance(value, _Wire):
        value = [*value.held, value.shown, *value.late]
    for x in pytree.tree_leaves(value):
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            yield storage._cdata, storage.nbytes()
