"""What forward leaves for backward, read off a graph that is laid out: a first guess of what a plan takes of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Node

from shardc.compiler.infer.objective import Objective
from shardc.compiler.infer.strategies import Laid
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.node import of, operands, spec, specs, tensors
from shardc.compiler.rules.facts import computes


def saved_bytes(laid: Laid, objective: Objective, weight: Callable[[Node], int]) -> float:
    """Bytes of a rank. Of what is computed again in backward only what it begins with counts. weight: for how many
    calls of the whole model a call stands."""
    found: dict[Node, None] = {}
    for user in laid.gm.graph.nodes:
        if user.op == "call_function":
            found |= {made: None for used in operands(user) for made in _maker(used) if _kept(made, user)}
    return sum(weight(node) * _bytes(node, objective) for node in found)


def _maker(node: Node) -> Iterator[Node]:
    """The call that made the memory which a value shows; none for what was there before."""
    moves = node.target is reshard and spec(operands(node)[0]) != spec(node)
    if node.op == "call_function" and (moves or computes(node.target)):
        yield node
    elif node.op == "call_function" and operands(node):
        yield from _maker(operands(node)[0])


def _kept(made: Node, user: Node) -> bool:
    """Whether a value waits for a use in backward."""
    if of(made).phase == "backward":
        return False
    again = of(user).region if of(user).phase == "forward" else ""
    if of(made).region:
        return bool(again) and again != of(made).region
    return bool(again) or of(user).phase == "backward"


def _bytes(node: Node, objective: Objective) -> float:
    layouts = specs(node)
    return sum(t.numel() * t.element_size() * objective.share(s) for t, s in zip(tensors(node), layouts, strict=True))
