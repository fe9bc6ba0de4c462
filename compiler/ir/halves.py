"""One joint graph as two: forward, which saves what backward needs, and backward.

    forward(parameters, buffers, constants, batch) -> (outputs, mutations, saved)
    backward(saved, tangents, carries)             -> (gradients)

A value that forward marked for recomputation is not saved: backward computes it again, just before its
first use. Saved all the same are what torch's generator gave (with numbered draws the seed alone), so that both
halves draw the same, what is made from a buffer that forward changes, whose old value is gone by then, and what
leaves a recomputed region.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir.graph import Unrun, behind, forward_of, inputs_of, returned
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import is_random, of
from shardc.compiler.ir.signature import InputKind, OutputKind, Signature


@dataclass(frozen=True)
class Halves:
    """The two graphs; node names are those of the joint graph. `saved` names what one hands the other."""

    forward: GraphModule
    backward: GraphModule | None
    saved: tuple[str, ...]


def halves(gm: GraphModule, signature: Signature) -> Halves:
    """Split a joint graph of any stage; without gradients there is no backward half."""
    ends, forward = returned(gm), forward_of(gm, signature)
    first = [ends[i] for i in signature.indices(OutputKind.OUTPUT, OutputKind.MUTATION)]
    # Results of a forward call that only backward needs are taken apart in forward: tensors are saved, not tuples.
    forward |= {n for n in gm.graph.nodes if n.target is operator.getitem and n.args[0] in forward}
    gradients = [ends[i] for i in signature.indices(OutputKind.GRADIENT)]
    tangents = [node for _, node in inputs_of(gm, signature, InputKind.TANGENT, InputKind.CARRY)]
    if not tangents:
        return Halves(_forward(gm, forward, first, tangents), None, ())
    changed = {signature.inputs[signature.outputs[i].of or 0].node for i in signature.indices(OutputKind.MUTATION)}
    again = {n for n in forward if _may_run_again(n, changed) and not _leaves_region(n, forward)}
    body, saved = _backward_nodes(gradients, forward, again, tangents)
    front = _forward(gm, forward, [*first, *saved], tangents)
    back = _graph(gm, [*saved, *tangents], body, gradients)
    return Halves(front, back, tuple(n.name for n in saved))


def _backward_nodes(
    gradients: list, forward: set[Node], again: set[Node], tangents: Collection[Node]
) -> tuple[list[Node], list[Node]]:
    """What backward computes, in order, and what it must be handed. again: of forward, what is not saved."""
    kept = forward - again
    needed = behind(gradients, lambda n: _is_saved(n, kept))
    saved = sorted(n for n in needed if _is_saved(n, kept) and n not in tangents)
    body: list[Node] = []
    placed: set[Node] = set()

    def place(node: Node) -> None:
        if node in placed or node in stop or node in tangents:
            return
        placed.add(node)
        for used in node.all_input_nodes:  # a recomputed value goes right before its first use
            place(used)
        body.append(node)

    stop = set(saved)
    for node in sorted(needed):
        if node not in forward:
            place(node)
    for node in gradients:  # a gradient may be a recomputed forward value itself
        if isinstance(node, Node):
            place(node)
    return body, saved


def _is_saved(node: Node, kept: set[Node]) -> bool:
    return node.op == "placeholder" or node in kept


def _may_run_again(node: Node, changed: set[str]) -> bool:
    """Whether a forward value is recomputed in backward; a result of a call, where the call is."""
    if node.target is operator.getitem:
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    if not of(node).region or is_random(node):
        return False
    return not any(_reads(used, changed) for used in node.all_input_nodes)


def _leaves_region(node: Node, forward: set[Node]) -> bool:
    """Whether forward uses a value outside of the region that is recomputed with it: regions begin with what is
    saved, else the last one would have to wait for all before it."""
    region = of(node).region
    return any(user in forward and of(user).region != region for user in node.users)


def _reads(node: Node, changed: set[str]) -> bool:
    """Whether a value is one of these inputs, if only a piece or another layout of it."""
    if (move := move_of(node)) is not None:
        return any(_reads(part.args[0], changed) for part in move.each())
    return node.name in changed


def _forward(gm: GraphModule, keep: set[Node], returned: list, tangents: Collection[Node]) -> GraphModule:
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and n not in tangents]
    return _graph(gm, inputs, [n for n in gm.graph.nodes if n in keep and n.op != "placeholder"], returned)


def _graph(gm: GraphModule, inputs: list[Node], body: list[Node], returned: list) -> GraphModule:
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in body:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] if isinstance(n, Node) else n for n in returned))
    return Unrun(gm, graph)
