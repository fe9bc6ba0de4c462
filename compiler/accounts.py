"""What a program moves, in integers: collectives with their bytes.

Bytes on the wire are per rank, for the rank that sends most, with ring algorithms and the padding that
uneven pieces need: all_gather (n-1) p, reduce_scatter and all_to_all (n-1) p, all_reduce 2 (n-1) s/n for
pieces of p bytes and a value of s bytes over n ranks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from shardc.compiler import collectives as c
from shardc.compiler.collectives import Cut, cut_of
from shardc.compiler.graph import Call, move_of, specs, tensors
from shardc.compiler.mesh import Mesh
from shardc.compiler.rules.table import tensors_in


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
    value = (tensors(node) or tensors_in(node.meta.get("local")))[0]
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
    meta = node.meta
    return Collective(
        move.target.__name__, axis, meta.get("phase", "forward"), value.dtype, numel, sent,
        meta.get("path", ""), meta.get("where", ""), node.name, meta.get("why", ""),
    )  # fmt: skip


def cut_in(part: Call, mesh: Mesh) -> Cut:
    """How one value that moves is dealt into pieces, on the first rank."""
    source, after = part.args[0], part.meta["spec"]
    split = specs(source)[0] if part.target is c.all_gather else after
    dim = part.args[2] if part.target is c.all_to_all else part.args[1]
    return cut_of(split, dim, part.axis, mesh, mesh.coords(0), specs(source)[0])


def _fetched(move: Call, value: torch.Tensor) -> tuple[int, int]:
    """(elements of the dim's whole, bytes sent by the rank that sends most). value: what rank 0 gets."""
    dim, _, held, wanted = move.args[1:5]
    asked = [[i for i in c.indices_of(runs) if 0 <= i < sum(held)] for runs in wanted]
    rest = math.prod(n for d, n in enumerate(value.shape) if d != dim)
    owner = [r for r, n in enumerate(held) for _ in range(n)]
    sent = [sum(owner[i] == me for r, mine in enumerate(asked) if r != me for i in mine) for me in range(len(held))]
    return sum(held) * rest, max(sent) * rest * value.element_size()


ALIASES = ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
           "alias", "detach", "getitem", "split", "split_with_sizes", "unbind",
           "wait", "unbucket")  # fmt: skip


def _owner(node: Node) -> Node:
    """The node whose memory a view shows. Values that moved together are taken apart into memory of their own."""
    while node.op == "call_function" and not is_part(node):
        name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
        if name not in ALIASES or not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node


def is_part(node: Node) -> bool:
    """Whether a node picks one of the values that a collective moved together."""
    if node.target is not operator.getitem:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return source.target is c.wait or move_of(source) is not None


def is_view(node: Node) -> bool:
    """Whether a node shows another one's memory and does no work itself."""
    return _owner(node) is not node


def last_uses(nodes: Sequence[Node]) -> dict[Node, int]:
    """Of each value that owns memory, which of the nodes is the last to use it or a view of it."""
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[_owner(used)] = i
    return last
