"""Stretches of a captured forward that repeat, such as the layers of a transformer, and the graph that calls them.

    runs, calls = repeats(graph), with_calls(graph, ...)

A run is the nodes of one module's call, or one node with a graph of its own (a checkpoint). Two runs are the same
layer if they hold the same operators in the same order, joined alike, with the same constants and inputs of equal
metadata. They may differ in what only names them: the keys of marks, source lines and module paths, as long as each
of the first run's goes with one of the other's.

Which runs are worth it is a matter of cost: a layer is traced for its first, middle and last place at most, as what
comes back to it differs there.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir.marks import GRAD, MARK, parse_key
from shardc.compiler.trace.torch_internals import AMBIENT

TRACES = 3  # of one layer: for its first, middle and last place
CALL = 4  # what a call costs, in nodes
PLAIN = (bool, int, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout)
# What changes how autograd treats a tensor. A layer's border makes another tensor of it, which this would miss.
AUTOGRAD = ("detach_", "requires_grad_", "register_hook")


@dataclass
class Names:
    """What one place of a layer calls by another name than the first place does."""

    keys: dict[str, str] = field(default_factory=dict)  # of marks
    lines: dict[str, str] = field(default_factory=dict)  # stack traces
    owners: dict[tuple[str, ...], Any] = field(default_factory=dict)  # nn_module_stack by its keys

    @classmethod
    def between(cls, first: Sequence[Node], other: Sequence[Node]) -> Names | None:
        """None where one name stands for two."""
        names = cls()
        for a, b in zip(_with_bodies(first), _with_bodies(other), strict=True):
            stack = b.meta.get("nn_module_stack") or {}
            owners = names.owners.setdefault(tuple(a.meta.get("nn_module_stack") or {}), stack)
            line = b.meta.get("stack_trace") or ""
            if tuple(owners) != tuple(stack) or names.lines.setdefault(a.meta.get("stack_trace") or "", line) != line:
                return None
            if a.target is MARK:
                key, new = str(a.args[1]), str(b.args[1])
                if (
                    names.keys.setdefault(key, new) != new
                    or names.keys.setdefault(key + GRAD, new + GRAD) != new + GRAD
                ):
                    return None
        return names


@dataclass(eq=False)
class Layer:
    """One that several places have: as a graph from its inputs to what leaves it."""

    body: Graph
    passed_on: tuple[int, ...]  # inputs that later nodes use too: see `with_calls`


@dataclass(eq=False)
class Place:
    """Where a layer stands in the forward graph."""

    number: int
    layer: Layer
    nodes: Sequence[Node]
    inputs: Sequence[Node]
    outputs: Sequence[Node]
    names: Names


@dataclass(eq=False)
class _Run:
    nodes: list[Node]
    parts: list[_Run]
    size: int  # operators, those of bodies included
    form: Any = None
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    passed_on: tuple[int, ...] = ()


def repeats(graph: Graph) -> list[Place]:
    """The places of layers, in order; none where the graph has what cannot be told to be inside or outside of one."""
    nodes = list(graph.nodes)
    calls = [n for n in nodes if n.op not in ("placeholder", "get_attr", "output")]
    if not calls or any(n.op == "call_module" or _changes_how_others_behave(n) for n in _with_bodies(calls)):
        return []
    at = {n: i for i, n in enumerate(nodes)}
    root = _run(calls, 0)
    runs = list(_all(root))
    for run in runs:
        _describe(run, at)
    counts = Counter(run.form for run in runs if run.form is not None)
    chosen = sorted(_cheapest(root, counts)[1], key=lambda run: at[run.nodes[0]])
    firsts: dict[Any, tuple[_Run, Layer]] = {}
    places: list[Place] = []
    for run in chosen:
        first, layer = firsts.setdefault(run.form, (run, Layer(_body(run), run.passed_on)))
        names = Names.between(first.nodes, run.nodes)
        if names is not None:
            places.append(Place(len(places), layer, run.nodes, run.inputs, run.outputs, names))
    return places


def with_calls(graph: Graph, places: Iterable[Place], call: Callable[[Place], Callable[..., Any]]) -> Graph:
    """The graph with one node for each place, which calls `call(place)` with its inputs for a tuple of outputs.

    An input that is used again later leaves the layer as one more output, which the later uses take. So its gradient
    goes through the layer backward and grows there, summand by summand, in the order in which it would have.
    """
    within = {n: place for place in places for n in place.nodes}
    new, of = Graph(), {}
    new.set_codegen(graph._codegen)
    for n in graph.nodes:
        place = within.get(n)
        if place is None:
            of[n] = new.node_copy(n, of.__getitem__)
        elif n is place.nodes[-1]:
            made = new.call_function(call(place), tuple(of[i] for i in place.inputs))
            made.meta = dict(n.meta)
            leaving = [*place.outputs, *(place.inputs[i] for i in place.layer.passed_on)]
            for i, old in enumerate(leaving):
                of[old] = new.call_function(_item, (made, i))
    return new


def _item(values: Sequence[Any], i: int) -> Any:
    return values[i]


# ---- finding runs


def _run(nodes: list[Node], depth: int) -> _Run:
    """These nodes, and what they consist of: calls of modules further in, and nodes with a graph of their own."""
    size = sum(_size(n) for n in nodes)
    while True:
        groups = [list(g) for _, g in groupby(nodes, key=lambda n: _owner(n, depth))]
        if len(groups) > 1 or _owner(nodes[0], depth) is None:
            break
        depth += 1
    parts = [_run(g, depth + 1) for g in groups if len(g) > 1 and _owner(g[0], depth) is not None]
    alone = [n for g in groups if len(g) == 1 or _owner(g[0], depth) is None for n in g]
    for i, n in enumerate(alone):
        if _size(n) > 1:
            items = takewhile(lambda m, n=n: m.target is operator.getitem and m.args[0] is n, alone[i + 1 :])
            run = [n, *items]
            if len(run) < len(nodes):
                parts.append(_Run(run, [], sum(_size(m) for m in run)))
    return _Run(nodes, parts, size)


def _owner(n: Node, depth: int) -> Any:
    """The module that is called at a depth, and by which name, as one may have several."""
    stack = list((n.meta.get("nn_module_stack") or {}).items())
    return (stack[depth][0], stack[depth][1][0]) if depth < len(stack) else None


def _all(run: _Run) -> Iterator[_Run]:
    yield run
    for part in run.parts:
        yield from _all(part)


def _cheapest(run: _Run, counts: Counter[Any]) -> tuple[float, list[_Run]]:
    """The fewest nodes to trace for a run, as one layer or by what it consists of; and the layers for it."""
    parts = [_cheapest(part, counts) for part in run.parts]
    split = run.size - sum(part.size for part in run.parts) + sum(cost for cost, _ in parts)
    whole = CALL + run.size * TRACES / counts[run.form] if run.form is not None else float("inf")
    if whole < min(split, run.size):
        return whole, [run]
    return split, [layer for _, layers in parts for layer in layers]


def _bodies(n: Node) -> list[Graph]:
    """The graphs that a node is given to run."""
    return [held.graph for operand in n.all_input_nodes if (held := _held(operand))]


def _held(n: Node) -> GraphModule | None:
    """The graph that a node stands for."""
    owner: Any = n.graph.owning_module if n.op == "get_attr" else None
    for name in str(n.target).split("."):
        owner = getattr(owner, name, None)
    return owner if isinstance(owner, GraphModule) else None


def _with_bodies(nodes: Iterable[Node]) -> Iterator[Node]:
    for n in nodes:
        yield n
        for body in _bodies(n):
            yield from _with_bodies(body.nodes)


def _size(n: Node) -> int:
    return 1 + sum(1 for body in _bodies(n) for _ in _with_bodies(body.nodes))


def _value(n: Node) -> Any:
    return n.meta.get("example_value")


def _changes_how_others_behave(n: Node) -> bool:
    """Whether a call is made for something else than its result: it has none, and no operand to write to; or it is for
    what autograd does later."""
    if n.op not in ("call_function", "call_method") or n.target in AMBIENT:
        return False
    if getattr(n.target, "__name__", n.target) in AUTOGRAD:
        return True
    return not _bodies(n) and not any(isinstance(_value(m), (Tensor, tuple, list)) for m in (n, *n.all_input_nodes))


# ---- what two runs have in common


def _describe(run: _Run, at: dict[Node, int]) -> None:
    """Sets the form that equal runs share, or leaves it None where a run cannot be a layer."""
    inside = {n: i for i, n in enumerate(run.nodes)}
    inputs: dict[Node, int] = {}

    def operand(n: Node) -> Any:
        if n in inside:
            return ("node", inside[n])
        return ("input", inputs.setdefault(n, len(inputs)))

    rows = tuple(_row(n, operand) for n in run.nodes)
    run.inputs = list(inputs)
    run.outputs = [n for n in run.nodes if any(user not in inside for user in n.users)]
    if not run.outputs or not all(isinstance(_value(n), Tensor) for n in (*run.inputs, *run.outputs)):
        return
    end = at[run.nodes[-1]]
    run.passed_on = tuple(
        i for i, n in enumerate(run.inputs) if _value(n).requires_grad and any(at[user] > end for user in n.users)
    )
    leaving = tuple(inside[n] for n in run.outputs)
    run.form = (rows, tuple(about(_value(n)) for n in run.inputs), leaving, run.passed_on)


def about(x: Tensor) -> tuple[Any, ...]:
    """What tracing looks at in a tensor."""
    return (tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg())


def _row(n: Node, operand: Callable[[Node], Any]) -> Any:
    if n.op == "placeholder":
        return n.op
    args: Any = n.args
    if n.target is MARK:
        key = parse_key(str(n.args[1]))
        args = (n.args[0], key.kind, key.path, key.text)
    custom = repr(n.meta.get("custom") or "")
    target = n.target if isinstance(n.target, str) else id(n.target)
    return (n.op, target, _form(args, n, operand), _form(n.kwargs, n, operand), custom)


def _form(value: Any, n: Node, operand: Callable[[Node], Any]) -> Any:
    """A value as something that is equal, and hashes equal, for equal values only."""
    if isinstance(value, Node):
        held = _held(value)
        return ("graph", _graph_form(held)) if held else operand(value)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_form(item, n, operand) for item in value))
    if isinstance(value, dict):
        return (dict, *((key, _form(item, n, operand)) for key, item in value.items()))
    if isinstance(value, slice):
        return (slice, *(_form(item, n, operand) for item in (value.start, value.stop, value.step)))
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))
    return (type(value), value) if isinstance(value, PLAIN) else ("object", id(value))


def _graph_form(gm: GraphModule) -> Any:
    inside = {n: i for i, n in enumerate(gm.graph.nodes)}
    policy = gm.meta.get("_checkpoint_context_fn")
    return (id(policy) if policy else None, *(_row(n, lambda m: ("node", inside[m])) for n in inside))


def _body(run: _Run) -> Graph:
    body, of = Graph(run.nodes[0].graph.owning_module), {}
    for i, n in enumerate(run.inputs):
        of[n] = body.placeholder(f"input_{i}")

    def operand(n: Node) -> Node:
        return of[n] if n in of else of.setdefault(n, body.node_copy(n))  # a body, by its name

    for n in run.nodes:
        of[n] = body.node_copy(n, operand)
    body.output(tuple(of[n] for n in run.outputs))
    return body
