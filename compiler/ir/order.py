"""The order of a graph's calls, and what is made of what."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
from torch.fx import Graph, Node


def uses(graph: Graph) -> nx.DiGraph:
    """An edge from each value to each node that uses it; nodes in graph order."""
    found = nx.DiGraph()
    found.add_nodes_from(graph.nodes)
    found.add_edges_from((used, node) for node in graph.nodes for used in node.all_input_nodes)
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
