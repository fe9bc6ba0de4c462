"""A whole graph: its calls and ends, and copies of it."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir.node import of, stays
from shardc.compiler.ir.signature import Input, InputKind, Output, OutputKind, Signature
from shardc.compiler.ir.views import is_kept


def call_nodes(gm: GraphModule, *targets: Any) -> list[Node]:
    """The graph's operator calls in order, or those of the given targets."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    return [n for n in nodes if n.target in targets] if targets else nodes


def early(gm: GraphModule) -> list[Node]:
    """What forward makes without needing it. Random draws and checks, used or not and in order: the generator moves
    on. And the pieces of parameters that it keeps for backward."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and of(n).phase != "backward"]
    return [n for n in nodes if stays(n) or is_kept(n)]


def output_node(gm: GraphModule) -> Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")


def returned(gm: GraphModule) -> list[Any]:
    """What the graph returns: nodes, or None where there is no value."""
    return list(output_node(gm).args[0])  # pyright: ignore[reportArgumentType]


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def inputs_of(gm: GraphModule, signature: Signature, *kinds: InputKind) -> list[tuple[Input, Node]]:
    """The graph's placeholders, with what they are: all, or those of some kinds."""
    pairs = zip(signature.inputs, placeholders(gm), strict=True)
    return [(entry, node) for entry, node in pairs if not kinds or entry.kind in kinds]


def results_of(gm: GraphModule, signature: Signature, *kinds: OutputKind) -> list[tuple[Output, Node]]:
    """The values that the graph returns, with what they are: all, or those of some kinds."""
    pairs = zip(signature.outputs, returned(gm), strict=True)
    return [(e, node) for e, node in pairs if isinstance(node, Node) and (not kinds or e.kind in kinds)]


def forward_of(gm: GraphModule, signature: Signature) -> set[Node]:
    """What the caller's results are made of, and what forward makes besides."""
    seen: set[Node] = set()
    stack = [node for _, node in results_of(gm, signature, OutputKind.OUTPUT, OutputKind.MUTATION)] + early(gm)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


class Unrun(GraphModule):
    """A graph whose code is generated when it is first called or asked for: most copies never are."""

    def recompile(self) -> Any:
        return super().recompile() if "forward" in vars(type(self)) else None

    def forward(self, *args: Any) -> Any:
        GraphModule.recompile(self)  # it gives this object's class the generated forward
        return self.forward(*args)

    @property
    def code(self) -> str:
        if "forward" not in vars(type(self)):
            GraphModule.recompile(self)
        return super().code


def copy_graph(gm: GraphModule) -> GraphModule:
    """An independent graph with the same nodes, names and meta."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return Unrun(gm, graph)
