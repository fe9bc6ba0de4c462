"""Kernels that read an operand as if it lay in memory as it did when traced are given it contiguous, where it may not.

    %h: f32[4, 8, 8, 8] = shardc.all_gather(%conv, 1, tp)          traced in channels_last; what is gathered is not
    %norm: (...) = aten.native_group_norm(%h, ...)
  ==>
    %contiguous: f32[4, 8, 8, 8] = aten.contiguous(%h)
    %norm: (...) = aten.native_group_norm(%contiguous, ...)

Which kernel runs, and how it reads, was settled when forward was traced; such a kernel reads contiguous operands right
in any case. What arrives from elsewhere is contiguous: collectives, slices, and inputs that were so when traced. Left
alone: a call whose operands come of values that were contiguous when traced, or of products, which give such; and all
operators that look for themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from shardc.compiler.ir.graph import call_nodes, inputs_of
from shardc.compiler.ir.node import of, specs, tensors, val
from shardc.compiler.ir.rewrite import emit, redirect
from shardc.compiler.ir.signature import InputKind
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import gives_contiguous, is_view, relies_on_strides

aten = torch.ops.aten


@dataclass(frozen=True)
class PackOperands:
    name = "pack-operands"
    takes = gives = Stage.LOCAL
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        if not any(relies_on_strides(node.target) for node in call_nodes(gm)):
            return PassResult()
        given = dict.fromkeys(node for _, node in inputs_of(gm, ctx.signature, InputKind.BATCH) if _several(node))
        memory = _Memory({x for x in given if _contiguous(x)})
        for node in gm.graph.nodes:
            memory.add(node)
            if not relies_on_strides(node.target):
                continue
            if not memory.as_traced[node]:
                operands = [x for x in node.all_input_nodes if _several(x) and not memory.is_contiguous(x)]
                with gm.graph.inserting_before(node):
                    packed = {x: _packed(x) for x in operands}
                node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n, of=packed: of.get(n, n))
                changes["operands"] += len(packed)
                memory.packed(node)
        for x in [x for x in given if x in memory.needed]:
            with gm.graph.inserting_before(call_nodes(gm)[0]):
                packed = _packed(x)
            redirect([user for user in x.users if user is not packed and user.op != "output"], x, packed)
            changes["inputs"] += 1
        return PassResult(changes)


class _Memory:
    """Of each node, whether what ranks hold of it lies in memory as it did when traced; of inputs that were
    contiguous then, which must be so for that."""

    def __init__(self, given: Set[Node]) -> None:
        self.as_traced: dict[Node, bool] = {}
        self.needed: set[Node] = set()
        self._given, self._if = given, dict[Node, frozenset[Node]]()

    def add(self, node: Node) -> None:
        self._if[node] = frozenset([node] if node in self._given else [])
        if node.op == "placeholder" or getattr(node.target, "namespace", "") == "shardc":
            self.as_traced[node] = _contiguous(node)
        elif gives_contiguous(node.target, node.kwargs):
            self.as_traced[node] = True
        elif val(node) is None and is_view(node.target):
            self.as_traced[node] = False  # a part, which localizing took
        else:
            self.as_traced[node] = all(self.as_traced[x] for x in node.all_input_nodes)
            self._if[node] = frozenset().union(*(self._if[x] for x in node.all_input_nodes))
        if relies_on_strides(node.target):
            self.needed |= self._if[node]

    def is_contiguous(self, node: Node) -> bool:
        return self.as_traced[node] and _contiguous(node)

    def packed(self, node: Node) -> None:
        """What such a kernel gives of contiguous operands is contiguous."""
        self.as_traced[node] = _contiguous(node)


def _packed(x: Node) -> Node:
    if val(x) is None:
        return emit(aten.contiguous.default, (x,), x, value=None, local=of(x).local)
    return emit(aten.contiguous.default, (x,), x, layout=specs(x)[0])


def _several(x: Node) -> bool:
    """Whether it is a tensor of several dims."""
    value = of(x).local if val(x) is None else val(x)
    return isinstance(value, Tensor) and value.dim() > 1


def _contiguous(x: Node) -> bool:
    """Whether what was traced is."""
    return val(x) is not None and all(t.is_contiguous() for t in tensors(x))
