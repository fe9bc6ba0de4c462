"""Which values show another one's memory, and how long memory is needed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.moves import move_of

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


class Kind(NamedTuple):
    """How a tensor lies in memory, and where."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def is_kept(node: Node) -> bool:
    """Whether a node is what forward keeps of a gathered parameter for backward: memory of its own."""
    return node.target is c.local_slice and bool(node.meta.get("kept"))


def outlives(node: Node) -> bool:
    """Whether a slice is to have memory of its own, lest it hold that of the whole: what is kept, and a gradient."""
    return is_kept(node) or (node.meta.get("phase") == "backward" and any(user.op == "output" for user in node.users))
