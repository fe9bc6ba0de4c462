"""What a program moves, in integers: collectives with their bytes.

Bytes on the wire are per rank, for the rank that sends most, with the padding that uneven pieces need.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.moves import Call, move_of
from shardc.compiler.ir.node import local_nbytes, of, tensors
from shardc.compiler.ir.routes import cuts_of, joint_rows
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.cost import wire_bytes
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
    value = (tensors(node) or tensors_in(of(node).local))[0]
    n, size = mesh[move.axis], value.element_size()
    if move.target is c.fetch:
        numel, sent = _fetched(move, value)
    elif move.target is c.all_reduce:
        numel = local_nbytes(node, mesh) // size
        sent = wire_bytes("all_reduce", numel * size, n)
    else:
        pieces = joint_rows(cuts_of(move, mesh, mesh.coords(0)))
        numel, sent = sum(pieces), wire_bytes(move.target.__name__, n * max(pieces) * size, n)
    view = of(node)
    found = (move.target.__name__, move.axis, view.phase, value.dtype, numel, int(sent))
    return Collective(*found, view.path, view.where, node.name, view.why)


def _fetched(move: Call, value: torch.Tensor) -> tuple[int, int]:
    """(elements of the dim's whole, bytes sent by the rank that sends most). value: what rank 0 gets."""
    dim, _, held, wanted = move.args[1:5]
    asked = [[i for i in c.indices_of(runs) if 0 <= i < sum(held)] for runs in wanted]
    rest = math.prod(n for d, n in enumerate(value.shape) if d != dim)
    owner = [r for r, n in enumerate(held) for _ in range(n)]
    sent = [sum(owner[i] == me for r, mine in enumerate(asked) if r != me for i in mine) for me in range(len(held))]
    return sum(held) * rest, max(sent) * rest * value.element_size()
