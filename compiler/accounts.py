"""What a program moves and holds, in integers: collectives with their bytes, and the peak of live bytes.

Bytes on the wire are per rank, for the rank that sends most, with ring algorithms and the padding that
uneven pieces need: all_gather (n-1) p, reduce_scatter and all_to_all (n-1) p, all_reduce 2 (n-1) s/n for
pieces of p bytes and a value of s bytes over n ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from shardc.compiler import collectives as c
from shardc.compiler.collectives import cut_of
from shardc.compiler.graph import Call, local_nbytes, move_of, specs, tensors
from shardc.compiler.halves import Halves
from shardc.compiler.mesh import Mesh
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.signature import Signature


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
    n, source = mesh[axis], move.args[0]
    value = (tensors(node) or tensors_in(node.meta.get("local")))[0]
    if move.target is c.all_reduce:
        shape = specs(node)[0].local_shape(mesh, coords) if specs(node) else value.shape
        numel = math.prod(shape)
        sent = 2 * (n - 1) * numel * value.element_size() // n
    elif move.target is c.fetch:
        numel, sent = _fetched(move, value)
    else:
        split = source if move.target is c.all_gather else node
        dim = move.args[2] if move.target is c.all_to_all else move.args[1]
        cut = cut_of(specs(split)[0], dim, axis, mesh, coords, specs(source)[0])
        pieces = [math.prod(cut.piece_view(i)) for i in range(n)]
        numel, largest = sum(pieces), max(pieces)
        sent = (n - 1) * largest * value.element_size()
    meta = node.meta
    return Collective(
        move.target.__name__, axis, meta.get("phase", "forward"), value.dtype, numel, sent,
        meta.get("path", ""), meta.get("where", ""), node.name, meta.get("why", ""),
    )  # fmt: skip


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
    """The node whose memory a view shows."""
    while node.op == "call_function":
        name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
        if name not in ALIASES or not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node


def peak_bytes(parts: Halves, signature: Signature, mesh: Mesh) -> int:
    """The most bytes alive at once: inputs and saved values for as long as they are, the rest until last use."""
    forward = _peak(parts.forward, mesh)
    backward = _peak(parts.backward, mesh) if parts.backward is not None else 0
    return max(forward, backward)


def _peak(gm: GraphModule, mesh: Mesh) -> int:
    nodes = list(gm.graph.nodes)
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[_owner(used)] = i
    alive = sum(local_nbytes(n, mesh) for n in nodes if n.op == "placeholder")
    peak, ends = alive, {}
    for node, i in last.items():
        ends.setdefault(i, []).append(node)
    for i, node in enumerate(nodes):
        if node.op == "call_function" and _owner(node) is node:
            alive += local_nbytes(node, mesh)
            peak = max(peak, alive)
        for dead in ends.get(i, ()):
            if dead.op != "placeholder":
                alive -= local_nbytes(dead, mesh)
    return peak
