"""Which values show another one's memory, and how long memory is needed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.moves import picked
from shardc.compiler.ir.node import arguments, of
from shardc.compiler.rules import facts


def shows(node: Node) -> bool:
    """Whether a node's results lie in the memory of its first operand, or may."""
    shown = node.args[0] if node.args else None
    return isinstance(shown, Node) and (node.target is operator.getitem or facts.is_view(node.target))


def _owner(node: Node) -> Node:
    """The node whose memory a view shows. Values that moved together are taken apart into memory of their own."""
    while not is_part(node) and (node.target is c.wait or shows(node)):
        node = arguments(node)[0]
    return node


def is_part(node: Node) -> bool:
    """Whether a node picks one of the values that a collective moved together, and gave memory of its own."""
    move = picked(node)
    return move is not None and move.target is not c.all_reduce


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


class Kind(NamedTuple):
    """How a tensor lies in memory, and where."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def is_kept(node: Node) -> bool:
    """Whether a node is what forward keeps of a gathered parameter for backward: memory of its own."""
    return node.target is c.local_slice and bool(of(node).kept)


def outlives(node: Node) -> bool:
    """Whether a slice is to have memory of its own, lest it hold that of the whole: what is kept, and a gradient."""
    return is_kept(node) or (of(node).phase == "backward" and any(user.op == "output" for user in node.users))
