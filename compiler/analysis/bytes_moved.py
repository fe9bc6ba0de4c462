"""What a program moves, in integers: collectives with their bytes.

Bytes on the wire are per rank, for the rank that sends most, with ring algorithms and the padding that
uneven pieces need: all_gather (n-1) p, reduce_scatter and all_to_all (n-1) p, all_reduce 2 (n-1) s/n for
pieces of p bytes and a value of s bytes over n ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.collectives import Cut, cut_of
from shardc.compiler.ir.moves import Call, move_of
from shardc.compiler.ir.node import of, specs, tensors
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh


class Collective(NamedTuple):
    """One collective of a program. numel: elements of the value before it is cut or after it is joined."""

    kind: str
    mesh_dim: str
    phase: str
    dtype: torch.dtype
    numel: int
    bytes_on_wire: int
    fqn: str
    where: str
    name: str = ""
    why: str = ""


def collectives_of(gm: GraphModule, mesh: Mesh) -> list[Collective]:
    """The collectives of a graph, in order; a mesh dim of one rank moves nothing and is left out."""
    moves = [(node, move_of(node)) for node in gm.graph.nodes]
    found = [_entry(node, move, mesh) for node, move in moves if move is not None and move.target in c.COLLECTIVES]
    return [entry for entry in found if mesh[entry.mesh_dim] > 1]


def _entry(node: Node, move: Call, mesh: Mesh) -> Collective:
    axis, coords = move.axis, mesh.coords(0)
    n = mesh[axis]
    value = (tensors(node) or tensors_in(of(node).local))[0]
    if move.target is c.all_reduce:
        shape = specs(node)[0].local_shape(mesh, coords) if specs(node) else value.shape
        numel = math.prod(shape)
        sent = 2 * (n - 1) * numel * value.element_size() // n
    elif move.target is c.fetch:
        numel, sent = _fetched(move, value)
    else:
        dealt = [cut_in(part, mesh).numels for part in move.each()]
        pieces = [sum(numels) for numels in zip(*dealt, strict=True)]
        numel, largest = sum(pieces), max(pieces)
        sent = (n - 1) * largest * value.element_size()
    view, kind = of(node), move.target.__name__
    found = (kind, axis, view.phase, value.dtype, numel, sent)
    return Collective(*found, view.path, view.where, node.name, view.why)


def cut_in(part: Call, mesh: Mesh) -> Cut:
    """How one value that moves is dealt into pieces, on the first rank."""
    split = part.before if part.target is c.all_gather else part.after
    dim = part.args[2] if part.target is c.all_to_all else part.args[1]
    return cut_of(split, dim, part.axis, mesh, mesh.coords(0), part.before)


def _fetched(move: Call, value: torch.Tensor) -> tuple[int, int]:
    """(elements of the dim's whole, bytes sent by the rank that sends most). value: what rank 0 gets."""
    dim, _, held, wanted = move.args[1:5]
    asked = [[i for i in c.indices_of(runs) if 0 <= i < sum(held)] for runs in wanted]
    rest = math.prod(n for d, n in enumerate(value.shape) if d != dim)
    owner = [r for r, n in enumerate(held) for _ in range(n)]
    sent = [sum(owner[i] == me for r, mine in enumerate(asked) if r != me for i in mine) for me in range(len(held))]
    return sum(held) * rest, max(sent) * rest * value.element_size()
