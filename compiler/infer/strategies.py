"""What each call of a graph may do with each mesh dim, given what the calls before it may do: its strategies.

The plan's layouts are fixed: inputs, parameters, marks, results. A call may split a factor that an operand may come
split by, let a pending sum pass, or take its operands whole. What ranks share out in the sweep stays shared out, and
the batch of data parallelism as it is. Where the sweep leaves a call whole though an operand is split, or it has no
operands and its result is one of a split dim, any factor is open: slicing what is whole is free.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.infer.atoms import Atom, Atoms
from shardc.compiler.infer.border_layouts import behind_mark, forward_marks
from shardc.compiler.infer.decisions import Decisions, call_rule
from shardc.compiler.infer.infer import PENDING, arrange, decided, may_split, passing, splits_of
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import arguments, nbytes, of, operands, result_number, set_spec, set_specs, spec, specs
from shardc.compiler.rules.table import OpRule
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Dim, Part, Spec, axes_of

SPELLINGS = 4  # ways to split the same factors over the same mesh dims
MOST = 32  # strategies of one call: with more, only those that differ from the sweep's in one mesh dim

Value = tuple[Node, int]  # a result of a call, or an input
Form = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Strategy:
    """One way to lay out a call: the layouts it takes and gives, and how it splits its factors."""

    operands: tuple[Spec, ...]
    results: tuple[Spec, ...]
    factors: tuple[tuple[str, Dim], ...] = ()

    @property
    def form(self) -> Form:
        """What mesh dims do where, whatever the sizes."""
        return tuple(
            (tuple(tuple(part.axes for part in dim) for dim in layout.dims), layout.pending)
            for layout in (*self.operands, *self.results)
        )


def _best(layouts: Sequence[Spec], fit: Callable[[Spec], int]) -> list[Spec]:
    """Those that fit best: (2@cp 4) and (2 4@cp) both split eight rows."""
    scores = [fit(layout) for layout in layouts]
    return [layout for layout, score in zip(layouts, scores, strict=True) if score == max(scores)]


def fixed(node: Node) -> bool:
    """Whether what comes to a node is what it takes: it moves it itself."""
    return node.target in (MARK, reshard)


@dataclass
class Laid:
    """A graph that is laid out, call by call."""

    gm: GraphModule
    mesh: Mesh
    known: Decisions

    @property
    def calls(self) -> Iterable[Node]:
        """What is laid out by a strategy."""
        ops = ("placeholder", "call_function")
        return (n for n in self.gm.graph.nodes if n.op in ops and specs(n) and n.target is not operator.getitem)

    def operands(self, node: Node) -> list[Node]:
        return operands(node) if node.op != "placeholder" else []

    def value(self, node: Node) -> Value:
        """The result that a node stands for: its own, or that which it picks."""
        if node.target is not operator.getitem:
            return node, 0
        source, index = arguments(node)
        return source, result_number(source, index)

    def applied(self) -> dict[Node, Strategy]:
        """The strategies by which the graph is laid out now."""
        out = {}
        for node in self.calls:
            taken = tuple([s for n in operands(node) for s in specs(n)]) if fixed(node) else of(node).wants or ()
            rule = None if fixed(node) or node.op == "placeholder" else call_rule(node, self.known)
            factors = decided(rule, taken, specs(node), self.mesh).factors if rule is not None else ()
            out[node] = Strategy(taken, specs(node), factors)
        return out


@dataclass
class Strategies(Laid):
    """Of every node in a graph that the sweep has laid out, in order; the sweep's own comes first."""

    data_axes: Collection[str] = ()  # mesh dims whose ranks share out the batch
    of: dict[Node, list[Strategy]] = field(default_factory=dict)
    values: dict[Value, list[Spec]] = field(default_factory=dict)  # the layouts in which a value may be made

    def __post_init__(self) -> None:
        self._partners = forward_marks(self.gm)
        self._atoms = Atoms(self.gm.graph.nodes, self.known)
        self._split = self._split_atoms()
        self._same: dict[tuple, list[Strategy]] = {}
        for node in self.calls:
            self.of[node] = found = self._strategies(node)
            for i in range(len(specs(node))):
                self.values[node, i] = list(dict.fromkeys(s.results[i] for s in found))

    @cached_property
    def uses(self) -> Mapping[Value, list[Node]]:
        """The calls that take each value."""
        out: dict[Value, list[Node]] = defaultdict(list)
        for node in self.of:
            for operand in self.operands(node):
                out[self.value(operand)].append(node)
        return out

    def _split_atoms(self) -> Mapping[str, set[Atom]]:
        """What each mesh dim splits in what some call gives: not in how parameters are stored."""
        out: dict[str, set[Atom]] = {axis: set() for axis in self.mesh.names}
        calls = (n for n in self.gm.graph.nodes if n.op == "call_function" and not fixed(n))
        for node, i, layout in ((n, i, layout) for n in calls for i, layout in enumerate(specs(n))):
            for axis in layout.axes():
                if axis in out and len(leaves := self._atoms.of(node, layout.dim_of(axis) or 0, i)) == 1:
                    out[axis].add(leaves[0].root())
        return out

    def _strategies(self, node: Node) -> list[Strategy]:
        arriving = [self.values[self.value(n)] for n in operands(node)] if node.op != "placeholder" else []
        if node.op == "placeholder":
            return [Strategy((), specs(node))]
        if fixed(node):
            made = [Strategy((layout,), (self._behind(node, layout),)) for layout in arriving[0]]
            return sorted(made, key=lambda s: s.operands != (spec(operands(node)[0]),))
        rule, taken = call_rule(node, self.known), of(node).wants or ()
        if rule is None:
            return [Strategy(taken, specs(node))]
        swept = Strategy(taken, specs(node), decided(rule, taken, specs(node), self.mesh).factors)
        if of(node).fixed or any(a not in self.mesh.names for s in (*taken, *specs(node)) for a in s.axes()):
            return [swept]
        open_axes = tuple(self._open(node, axis, taken) for axis in self.mesh.names)
        key = (id(rule), taken, specs(node), tuple(map(tuple, arriving)), open_axes)
        if key not in self._same:
            made = [swept, *self._calls(node, rule, swept, arriving, open_axes)]
            self._same[key] = list({(s.operands, s.results): s for s in reversed(made)}.values())[::-1]
            self._same[key].sort(key=lambda s: (s.operands, s.results) != (taken, specs(node)))
        return self._same[key]

    def _behind(self, node: Node, layout: Spec) -> Spec:
        if node.target is reshard:
            return arguments(node)[1]
        return behind_mark(node, layout, self._partners.get(node), self.mesh)

    def apply(self, picked: Mapping[Node, Strategy]) -> None:
        """Lay the graph out so. A mark in backward goes by what its partner in forward has become."""
        for node in self.gm.graph.nodes:
            if node.target is operator.getitem:
                source, r = self.value(node)
                set_spec(node, specs(source)[r])
            elif node.target is MARK:
                set_spec(node, self._behind(node, spec(operands(node)[0])))
            elif node in picked and node.op == "call_function" and node.target is not reshard:
                of(node).wants = picked[node].operands
                set_specs(node, picked[node].results)

    def _open(self, node: Node, axis: str, taken: Sequence[Spec]) -> frozenset[str]:
        """The factors of a call that a mesh dim may split though no operand comes split by them."""
        rule = call_rule(node, self.known)
        assert rule is not None
        came = any(axis in spec(n).axes() for n in operands(node))
        if came and not any(axis in s.axes() for s in (*taken, *specs(node))):
            return frozenset(rule.factors())
        met = set()
        for i, names in enumerate(rule.results):
            for d, dim_names in enumerate(names):
                if len(dim_names) == 1 and {a.root() for a in self._atoms.of(node, d, i)} & self._split[axis]:
                    met.add(dim_names[0])
        return frozenset(met)

    def _calls(
        self, node: Node, rule: OpRule, swept: Strategy, arriving: list[list[Spec]], open_axes: Sequence[frozenset[str]]
    ) -> Iterator[Strategy]:
        options = [
            self._options(rule, axis, swept, arriving, free)
            for axis, free in zip(self.mesh.names, open_axes, strict=True)
        ]
        sizes = [nbytes(n) for n in operands(node)]
        combined = list(itertools.islice(itertools.product(*options), MOST + 1))
        if len(combined) > MOST:
            first = [o[0] for o in options]
            combined = [(*first[:i], c, *first[i + 1 :]) for i, o in enumerate(options) for c in o]
        for picked in combined:
            choices = dict(zip(self.mesh.names, picked, strict=True))
            fitting = [_best(layouts, self._fit(rule, i, choices)) for i, layouts in enumerate(arriving)]
            for like in itertools.islice(itertools.product(*fitting), SPELLINGS):
                groups = {a: passing(a, rule, like, sizes) if c == PENDING else frozenset() for a, c in choices.items()}
                if any(c == PENDING and not groups[a] for a, c in choices.items()):
                    continue
                found = [splits_of(names, s, rule, self.mesh) for names, s in zip(rule.operands, like, strict=True)]
                made = arrange(rule, choices, groups, found, sizes, self.mesh)
                yield Strategy(made.operands, made.results, made.factors)

    def _options(
        self, rule: OpRule, axis: str, swept: Strategy, arriving: list[list[Spec]], free: frozenset[str]
    ) -> list[str | None]:
        """What a mesh dim may do in a call."""
        if self.mesh[axis] == 1:
            return [None]
        kept = {rule.leader(name) for name, dim in swept.factors if axis in axes_of(dim)}
        if kept and axis in self.data_axes:
            return [*kept]
        out: dict[str | None, None] = {}
        for names, layouts in zip(rule.operands, arriving, strict=True):
            for layout in layouts:
                for name, dim in splits_of(names, layout, rule, self.mesh).items():
                    if any(axis in part.axes for part in dim):
                        out[rule.leader(name)] = None
                if layout.reduction(axis) == "sum" and rule.linear:
                    out[PENDING] = None
        plain = [f for f in rule.factors() if f in free and rule.leader(f) == f and rule.size(f) > 1]
        out |= {f: None for f in plain if may_split(f, (Part(rule.size(f), (axis,)),), rule, self.mesh)}
        return [choice for choice in (*out, None) if not kept or choice not in (None, PENDING)]

    def _fit(self, rule: OpRule, i: int, choices: Mapping[str, str | None]) -> Callable[[Spec], int]:
        """In how many mesh dims an operand comes as choices would have it."""

        def fit(layout: Spec) -> int:
            splits = splits_of(rule.operands[i], layout, rule, self.mesh)
            by = {axis: rule.leader(name) for name, dim in splits.items() for part in dim for axis in part.axes}
            held = {a: PENDING for a, op in layout.pending if op == "sum"}
            return sum({**dict.fromkeys(choices), **by, **held}[a] == c for a, c in choices.items())

        return fit
