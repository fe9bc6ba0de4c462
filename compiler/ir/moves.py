"""What a node moves between ranks, or cuts out of what its own rank holds."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.node import arguments, of, spec, specs, tensors
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec


class Call(NamedTuple):
    """A collective or local move, whether it stands in the graph as itself or is started there."""

    target: Any
    args: tuple  # the operand first
    layouts: tuple[Spec, ...]  # of what it gives; none for a step inside one operator's local form

    @property
    def axis(self) -> str:
        return next(a for a in self.args[1:] if isinstance(a, str))

    @property
    def before(self) -> Spec:
        """The layout of the one value that moves."""
        return spec(self.args[0])

    @property
    def after(self) -> Spec:
        return self.layouts[0]

    def each(self) -> Iterator[Call]:
        """The values that move together, each as a call of its own: (operand, dim, mesh dim, ...)."""
        values, *rest = self.args
        if isinstance(values, Node):
            yield self
            return
        dims = [] if self.target is c.all_reduce else [rest.pop(0)]
        for value, layout, *dim in zip(values, self.layouts, *dims, strict=True):
            yield Call(self.target, (value, *dim, *rest), (layout,))


def move_of(node: Node) -> Call | None:
    """What a node moves, if anything; a `wait` moves nothing."""
    if node.target is c.start:
        operand, kind, *rest = node.args
        return Call(c.NAMED[kind], (operand, *rest), specs(node))  # pyright: ignore[reportArgumentType]
    if node.op == "call_function" and node.target in (*c.COLLECTIVES, *c.LOCAL_MOVES):
        return Call(node.target, tuple(node.args), specs(node))
    return None


def picked(node: Node) -> Call | None:
    """Of a part of what moved together how it moved."""
    if node.target is not operator.getitem:
        return None
    source, index = arguments(node)
    move = move_of(arguments(source)[0] if source.target is c.wait else source)
    return None if move is None else list(move.each())[index]


def piece_of(node: Node) -> Node | None:
    """Of a part of what moved together the value that it was."""
    move = picked(node)
    return None if move is None else move.args[0]


def divides_a_sum(node: Node, mesh: Mesh) -> bool:
    """Whether a node averages what a reduction gave, and nothing else sees: then it may do so where that lies.
    Over one rank the sum would be its operand."""
    if node.target is not torch.ops.aten.div.Tensor or node.kwargs or isinstance(node.args[1], Node):
        return False
    total = source = arguments(node)[0]
    if source.target is operator.getitem:  # one of several that move at once
        source = arguments(source)[0]
    move = move_of(arguments(source)[0] if source.target is c.wait else source)
    if move is None or move.target not in (c.all_reduce, c.reduce_scatter):
        return False
    if mesh[move.axis] == 1 or len(total.users) > 1:
        return False
    (value,) = tensors(total) or [of(total).local]
    return isinstance(value, Tensor) and value.dtype.is_floating_point
