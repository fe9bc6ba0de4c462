"""The order of a graph's calls."""

import random

import pytest
import torch
from torch.fx import Graph, Node

from shardc.compiler.ir.graph import made_of, settle


def drawn(seed: int, size: int = 30) -> Graph:
    """A graph whose calls use some of what stands before them."""
    rng, graph = random.Random(seed), Graph()
    values: list[Node] = [graph.placeholder(f"x{i}") for i in range(3)]
    for _ in range(size):
        values.append(graph.call_function(torch.add, tuple(rng.choices(values, k=2))))
    graph.output(tuple(values[-3:]))
    return graph


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


@pytest.mark.parametrize("seed", range(10))
def test_calls_moved_anywhere_come_behind_what_they_use(seed: int):
    graph, rng = drawn(seed), random.Random(seed)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    before = dict(zip(names(graph), graph.nodes, strict=True))
    for node in rng.sample(calls, 10):
        rng.choice(calls).prepend(node)
    settle(graph)
    graph.lint()
    assert {name: node.args for name, node in before.items()} == {n.name: n.args for n in graph.nodes}


@pytest.mark.parametrize("seed", range(3))
def test_an_order_that_is_one_stays(seed: int):
    graph = drawn(seed)
    before = names(graph)
    settle(graph)
    assert names(graph) == before


def test_a_call_comes_as_soon_as_what_it_uses_is_there():
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.exp, (a,))
    graph.call_function(torch.cos, (x,))
    graph.output(b)
    a.prepend(b)
    settle(graph)
    assert names(graph) == ["x", "neg", "exp", "cos", "output"]


def test_what_is_made_of_a_value_is_all_behind_it_but_the_output():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.add, (a, y))
    graph.output((a, b))
    assert list(made_of([a])) == [b] and {*made_of([x])} == {a, b}
