"""All ranks of a program in this process, in lockstep: every node runs on each rank's own piece.

A collective sees the pieces of all ranks at once, so nothing is sent and nothing can hang. It computes
what real ranks compute, so a test on one process proves the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.collectives import Cut, cut_of
from shardc.compiler.ir.moves import Call, move_of
from shardc.compiler.ir.node import is_random
from shardc.compiler.ir.routes import cuts_of
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.rank_numbers import bind
from shardc.runtime.run.error_lines import blaming
from shardc.runtime.shards import combine, deal, undeal
from shardc.runtime.workers import run_on_devices

Pieces = list[Any]  # one value per rank
Env = dict[Node, Pieces]
Coords = Mapping[str, int]


def simulate(
    gm: GraphModule,
    mesh: Mesh,
    inputs: Sequence[Pieces],
    watch: Callable[[Node, Pieces], None] | None = None,
) -> list[Pieces]:
    """Run a LOCAL graph on all ranks. inputs: per placeholder, each rank's piece; result: per output likewise.

    Between collectives each rank runs by itself, by the executor that replicas have (`workers`): on the device its
    pieces are on. watch, if given, sees every node's pieces as they are made; then all ranks go node by node.
    Values are dropped after their last use.
    """
    env: Env = {}
    feed, last = iter(inputs), _last_uses(gm)
    ranks = [_Rank(rank, mesh, mesh.coords(rank), env, last) for rank in range(mesh.size)]
    places = [_device(inputs, rank) for rank in range(mesh.size)]
    *body, output = gm.graph.nodes
    for stretch in _stretches(body, watch is None):
        first = stretch[0]
        if first.op == "placeholder":
            env[first] = list(next(feed))
        elif (move := move_of(first)) is not None:
            with blaming(first):
                env[first] = _move(move, env, mesh, [rank.coords for rank in ranks])
        elif len(stretch) == 1:
            env[first] = [rank.value(first) for rank in ranks]
        else:
            env |= {node: [None] * mesh.size for node in stretch}
            run_on_devices([partial(rank.run, stretch) for rank in ranks], places, kind="")
        if watch is not None:
            watch(first, env[first])
        for node in stretch:
            for dead in last.get(node, ()):
                del env[dead]
    return [env[v] if isinstance(v, Node) else [v] * mesh.size for v in output.args[0]]


def _move(move: Call, env: Env, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    found = [_moved(part, env[part.args[0]], mesh, coords) for part in move.each()]
    return found[0] if isinstance(move.args[0], Node) else [list(values) for values in zip(*found, strict=True)]


def _moved(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    """One value, by the ranks along the mesh dim."""
    out: Pieces = [None] * mesh.size
    for group in mesh.groups(move.axis):
        found = COLLECT[move.target](move, [pieces[r] for r in group], mesh, [coords[r] for r in group])
        for r, x in zip(group, found, strict=True):
            out[r] = x
    return out


@dataclass(frozen=True)
class _Rank:
    number: int
    mesh: Mesh
    coords: dict[str, int]
    env: Env  # every rank writes at its own place only
    last: dict[Node, list[Node]]

    def run(self, stretch: Sequence[Node]) -> None:
        for node in stretch:
            self.env[node][self.number] = self.value(node)
            for dead in self.last.get(node, ()):
                self.env[dead][self.number] = None

    def value(self, node: Node) -> Any:
        args, kwargs = bind((tuple(node.args), dict(node.kwargs)), self.mesh, self.coords, self._piece)
        # Every rank draws the same numbers; the generator moves on once.
        draws = is_random(node) and self.number < self.mesh.size - 1
        with blaming(node), torch.random.fork_rng(enabled=draws):
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def _piece(self, leaf: Any) -> Any:
        return self.env[leaf][self.number] if isinstance(leaf, Node) else leaf


def _stretches(nodes: Sequence[Node], long: bool) -> Iterator[list[Node]]:
    """The nodes in order, in stretches that a rank can run without the others. One generator serves all ranks."""
    stretch: list[Node] = []
    for node in nodes:
        alone = not long or node.op == "placeholder" or move_of(node) is not None or is_random(node)
        if alone and stretch:
            yield stretch
            stretch = []
        stretch.append(node)
        if alone:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _device(inputs: Sequence[Pieces], rank: int) -> torch.device:
    return next((pieces[rank].device for pieces in inputs if isinstance(pieces[rank], Tensor)), torch.device("cpu"))


def _last_uses(gm: GraphModule) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    out: dict[Node, list[Node]] = {}
    for used, user in last.items():
        if user.op != "output":
            out.setdefault(user, []).append(used)
    return out


def _all_reduce(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    return [combine(_op(move), pieces)] * len(pieces)


def _op(move: Call) -> str:
    return (*(a for a in move.args[1:] if isinstance(a, str)), "sum")[1]


def _all_gather(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    return [_shaped(undeal(pieces, _cut(move, mesh, at)), move, mesh, at) for at in coords]


def _reduce_scatter(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    return _local_slice(move, [combine(_op(move), pieces)] * len(pieces), mesh, coords)


def _local_slice(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    dealt = [deal(x, _cut(move, mesh, at))[i] for i, (x, at) in enumerate(zip(pieces, coords, strict=True))]
    return [_shaped(x, move, mesh, at) for x, at in zip(dealt, coords, strict=True)]


def _all_to_all(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    dealt = [deal(x, _cut(move, mesh, at)) for x, at in zip(pieces, coords, strict=True)]
    source = move.args[1]
    cuts = [cut_of(move.before, source, move.axis, mesh, at, move.after) for at in coords]
    mine = [undeal([d[i] for d in dealt], cut) for i, cut in enumerate(cuts)]
    return [_shaped(x, move, mesh, at) for x, at in zip(mine, coords, strict=True)]


def _cut(move: Call, mesh: Mesh, at: Coords) -> Cut:
    return cuts_of(move, mesh, at)[0]


def _shaped(x: Tensor, move: Call, mesh: Mesh, at: Coords) -> Tensor:
    return x.reshape(move.after.local_shape(mesh, at))


def _fetch(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    dim, _, _, wanted, *fill = move.args[1:]
    source = torch.cat(pieces, dim)
    n = source.shape[dim]
    if fill:
        source = torch.cat([source, source.new_full((*source.shape[:dim], 1, *source.shape[dim + 1 :]), *fill)], dim)
    at = [[i if 0 <= i < n else n for i in c.indices_of(runs)] for runs in wanted]
    return [source.index_select(dim, torch.tensor(mine, dtype=torch.int64, device=source.device)) for mine in at]


def _make_partial(move: Call, pieces: Pieces, mesh: Mesh, coords: Sequence[Coords]) -> Pieces:
    return [pieces[0], *(torch.zeros_like(x) for x in pieces[1:])]


COLLECT = {
    c.all_reduce: _all_reduce,
    c.all_gather: _all_gather,
    c.reduce_scatter: _reduce_scatter,
    c.all_to_all: _all_to_all,
    c.fetch: _fetch,
    c.local_slice: _local_slice,
    c.make_partial: _make_partial,
}
