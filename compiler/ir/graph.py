"""A whole graph: its calls and ends, their order, what is made of what, and copies of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx
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
    results = results_of(gm, signature, OutputKind.OUTPUT, OutputKind.MUTATION)
    return behind([*(node for _, node in results), *early(gm)])


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


def uses(graph: Graph) -> nx.DiGraph:
    """An edge from each value to each node that uses it; nodes in graph order."""
    found = nx.DiGraph()
    found.add_nodes_from(graph.nodes)
    found.add_edges_from((used, node) for node in graph.nodes for used in node.all_input_nodes)
    return found


def behind(nodes: Iterable[Any], is_given: Callable[[Node], bool] = lambda node: False) -> set[Node]:
    """These and all that they are made of; of what is given, not what that is made of."""
    found: set[Node] = set()
    stack = [node for node in nodes if isinstance(node, Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += () if is_given(node) else node.all_input_nodes
    return found


def made_of(nodes: Iterable[Node]) -> dict[Node, None]:
    """All that is made of these, in no order; the output is not."""
    found: dict[Node, None] = {}
    stack = [user for node in nodes for user in node.users]
    while stack:
        node = stack.pop()
        if node.op != "output" and node not in found:
            found[node] = None
            stack += node.users
    return found


def settle(graph: Graph) -> None:
    """Every node stays where it stands, or comes as soon after as what it uses is there."""
    at = {node: i for i, node in enumerate(graph.nodes)}
    last = graph.output_node()
    for node in list(nx.lexicographical_topological_sort(uses(graph), key=at.__getitem__)):
        if node is not last:
            last.prepend(node)
