"""Backward for a loss that does not use every output: without the tangents that never came, and what is made of them.

    %add: f32[8@dp, 512] = aten.add.Tensor(%grad_of_loss, %tangent_1)      ==>      %grad_of_loss

A gradient that depends on nothing else is None, as autograd has it, and not zeros. Backward is linear in what it
starts from, so what is made of nothing but missing values is missing too; a sum has one summand less, several values
that move together are fewer. What any other operator takes beside a value that is there is computed, from zeros.
Layouts, order and what forward saved stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import Unrun, placeholders, returned
from shardc.compiler.ir.moves import piece_of
from shardc.compiler.ir.node import arguments, tensors
from shardc.compiler.ir.owned import Homes

ADD = torch.ops.aten.add.Tensor
# What is made of a missing value by these is not nothing.
MADE = ("ones_like", "full_like", "new_ones", "new_full", "empty_like", "new_empty")


def without(gm: GraphModule, late: int, missing: Collection[int]) -> tuple[GraphModule, list[int]]:
    """A backward half without some of its inputs, and which of its inputs are left: of the missing ones those that
    must be zeros. late: so many, the last, are tangents, or gradients kept back. missing: positions among all."""
    inputs = placeholders(gm)
    there = {n for i, n in enumerate(inputs) if i >= len(inputs) - late and i not in missing}
    fewer = _Fewer(gm, there, {inputs[i] for i in missing})
    return fewer.graph(), [i for i, node in enumerate(inputs) if node in fewer.needed]


class _Fewer:
    """alive: what depends on values that come late and are there; gone: on missing ones alone."""

    def __init__(self, gm: GraphModule, alive: set[Node], gone: set[Node]) -> None:
        self.gm, self.alive, self.gone = gm, alive, gone
        self.stands_for: dict[Node, Node] = {}  # a sum with one summand left -> that one
        self.needed: set[Node] = set()
        self.parts: dict[Node, set[int]] = {}  # of several values at once, those that are needed
        for node in gm.graph.nodes:
            if node.op == "call_function":
                self._judge(node)
        self.ends = [None if node in gone else node for node in returned(gm)]
        self._need([node for node in self.ends if node is not None])

    def _judge(self, node: Node) -> None:
        piece = piece_of(node)
        used = node.all_input_nodes if piece is None else [piece]
        if self.alive.isdisjoint(used):
            if not self.gone.isdisjoint(used) and _name(node) not in MADE:
                self.gone.add(node)
            return
        self.alive.add(node)
        left = [n for n in used if n not in self.gone]
        if node.target is ADD and len(left) == 1 < len(used) and not node.kwargs and _alike(left[0], node):
            self.stands_for[node] = left[0]

    def _it(self, node: Node) -> Node:
        while node in self.stands_for:
            node = self.stands_for[node]
        return node

    def _need(self, stack: list[Node]) -> None:
        while stack:
            node = self._it(stack.pop())
            piece = piece_of(node)
            if piece is not None:
                stack.append(piece)
                for holder in _holders(node):
                    self.parts.setdefault(holder, set()).add(arguments(node)[1])
                    self.needed.add(holder)
            elif node not in self.needed:
                stack += node.all_input_nodes
            self.needed.add(node)

    def graph(self) -> GraphModule:
        graph, env = Graph(), dict[Node, Node]()
        homes = Homes()

        def here(tree: Any) -> Any:
            return map_arg(tree, lambda n: env[self._it(n)])

        for node in self.gm.graph.nodes:
            if node not in self.needed:
                continue
            args, meta = self._fewer(node)
            kwargs = dict(node.kwargs)
            if kwargs.get("reuse") and not homes.of(node).isdisjoint(self.stands_for):
                kwargs["reuse"] = False  # the sum was memory of its own, what stands for it may not be
            made = graph.create_node(node.op, node.target, here(args), here(kwargs), node.name)
            made.meta = meta
            env[node] = made
        graph.output(tuple(None if node is None else env[self._it(node)] for node in self.ends))
        return Unrun(self.gm, graph)

    def _fewer(self, node: Node) -> tuple[tuple, dict[str, Any]]:
        """A call's arguments and what it holds, of several values those that are needed."""
        args, meta = arguments(node), dict(node.meta)
        if piece_of(node) is not None:
            kept = sorted(self.parts[args[0]])
            return (args[0], kept.index(args[1])), meta
        if node not in self.parts:
            return args, meta
        kept = sorted(self.parts[node])

        def pick(x: Any) -> Any:
            return type(x)(x[i] for i in kept) if isinstance(x, (list, tuple)) else x

        return tuple(map(pick, args)), {k: pick(v) if k in ("val", "spec", "local") else v for k, v in meta.items()}


def _name(node: Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")


def _alike(a: Node, b: Node) -> bool:
    (x,), (y,) = tensors(a), tensors(b)
    return (x.shape, x.dtype) == (y.shape, y.dtype)


def _holders(part: Node) -> Sequence[Node]:
    """The call that several values move in; where it is started, what waits for it too."""
    source = arguments(part)[0]
    return [source, *source.all_input_nodes] if source.target is c.wait else [source]
