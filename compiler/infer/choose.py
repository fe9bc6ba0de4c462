"""The layouts of a whole graph, chosen together: an integer program over the strategies of its calls.

x[n, s] says that call n takes strategy s; y[v, h, k, t] that value v, made in layout h, is taken in layout t by its use
k; z[v, h, t] that it is brought from h to t, once for all that need it so:

    least   sum cost[n, s] x[n, s] + sum cost[h, t] z[v, h, t]
    so that sum_s x[n, s] = 1                                   of each call
            sum_t y[v, h, k, t] = x[v made in h]                of each use
            sum_h y[v, h, k, t] = x[k takes it in t]
            y[v, h, k, t] <= z[v, h, t]                         where h is not t

Calls that are alike in layers that are alike share their variables. HiGHS solves the relaxation, which is nearly always
integral, and branches where it is not: what it proves is the bound. No clock is asked, so all ranks find the same.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.fx import Node

from shardc.compiler.infer.objective import NEARLY_FREE, Objective, around, itemsize, total
from shardc.compiler.infer.strategies import Strategies, Strategy, fixed
from shardc.compiler.ir.node import of, operands, target_name
from shardc.compiler.spec.spec import Spec

BRANCHES = 200  # at most; what is best then is taken
NEAR = 1e-3  # of the cost: what is so near to the bound is not improved further

FEW = 5 * NEARLY_FREE

Kind = tuple[Node, int, tuple[tuple[Node, int], ...]]  # of a value: who makes it, which result it is, who uses it


@dataclass(frozen=True)
class Optimum:
    """What was picked, what it costs, what nothing can cost less than, and what it was before, in seconds."""

    picked: Mapping[Node, Strategy]
    cost: float
    bound: float
    before: float


def choose(found: Strategies, objective: Objective) -> Optimum:
    """The cheapest strategy of every call, and the bound. The first strategies are kept where none cost less."""
    first = {node: ways[0] for node, ways in found.of.items()}
    kinds = _kinds(found)
    program, chosen = _program(found, objective, kinds)
    values, bound = program.solve()
    before = total(found, objective, first)
    if values is None:
        return Optimum(first, before, min(bound, before), before)
    taken: Mapping[tuple[Node, Strategy], float] = {way: float(values[column]) for way, column in chosen.items()}
    best = {n: max(found.of[n], key=lambda s, n=n: taken[n, s]) for n in dict.fromkeys(kinds.values())}
    picked = _unless_worth(found, objective, {node: best[kind] for node, kind in kinds.items()})
    cost = total(found, objective, picked)
    if cost < before:
        return Optimum(picked, cost, min(bound, cost), before)
    return Optimum(first, before, min(bound, before), before)


def _unless_worth(found: Strategies, objective: Objective, picked: dict[Node, Strategy]) -> dict[Node, Strategy]:
    """The first strategies again, where others cost no less: an optimum says nothing of what does not matter."""
    changed = True
    while changed:
        changed = False
        for node, ways in found.of.items():
            if picked[node] != ways[0] and not fixed(node):
                before = around(found, objective, picked, node, picked[node])
                if around(found, objective, picked, node, ways[0]) <= before * (1 + 1e-9) + FEW:
                    picked[node], changed = ways[0], True
    return picked


def _kinds(found: Strategies) -> dict[Node, Node]:
    """The first call that each is like: in a module of the same name but for numbers, with as many calls before it,
    the same strategies, and operands of the same places."""
    place, count, first, out = {}, Counter(), {}, {}
    for node, ways in found.of.items():
        at = of(node).path, of(node).phase
        place[node] = re.sub(r"\d+", "*", at[0]), at[1], count[at], target_name(node.target)
        count[at] += 1
        if node.op == "placeholder":
            place[node] = out[node] = node
            continue
        sources = tuple([(place[n] if found.of[n][1:] else n, i) for n, i in map(found.value, operands(node))])
        out[node] = first.setdefault((place[node], tuple(ways), sources), node)
    return out


def _program(
    found: Strategies, objective: Objective, kinds: Mapping[Node, Node]
) -> tuple[_Program, dict[tuple[Node, Strategy], int]]:
    """The integer program, and the column of each strategy of each kind of call."""
    program, x = _Program(), {}
    for node, many in Counter(kinds.values()).items():
        x |= {(node, s): program.column(many * objective.call(node, s), whole=True) for s in found.of[node]}
        program.row({x[node, s]: 1.0 for s in found.of[node]}, equal=1)
    for (source, r, users), many in _values(found, kinds).items():
        made = _by_layout(found.of[source], [s.results[r] for s in found.of[source]], source, x)
        moves: dict[tuple[Spec, Spec], int] = {}
        for user, i in users:
            taken = _by_layout(found.of[user], [s.operands[i] for s in found.of[user]], user, x)
            flows = {
                (held, needed): program.column(0.0)
                for held in made
                for needed in taken
                if held == needed or not fixed(user)
            }
            for held, makers in made.items():
                program.balance([f for (h, _), f in flows.items() if h == held], makers)
            for needed, takers in taken.items():
                program.balance([f for (_, t), f in flows.items() if t == needed], takers)
            for (held, needed), flow in flows.items():
                if held != needed:
                    if (held, needed) not in moves:
                        cost = objective.move(held, needed, itemsize((source, r)))
                        moves[held, needed] = program.column(many * cost)
                    program.row({flow: 1.0, moves[held, needed]: -1.0})
    return program, x


def _values(found: Strategies, kinds: Mapping[Node, Node]) -> Counter[Kind]:
    """How many values there are of each kind."""
    users: dict[tuple[Node, int], list[tuple[Node, int]]] = defaultdict(list)
    for node in found.of:
        for i, operand in enumerate(found.operands(node)):
            users[found.value(operand)].append((kinds[node], i))
    return Counter((kinds[node], r, tuple(dict.fromkeys(by))) for (node, r), by in users.items())


def _by_layout(
    ways: Sequence[Strategy], layouts: Sequence[Spec], node: Node, x: Mapping[tuple[Node, Strategy], int]
) -> dict[Spec, list[int]]:
    out: dict[Spec, list[int]] = defaultdict(list)
    for strategy, layout in zip(ways, layouts, strict=True):
        out[layout].append(x[node, strategy])
    return out


@dataclass
class _Program:
    """Columns from 0 to 1 with their costs, some of them whole numbers, and rows: at most 0, or equal to a number."""

    cost: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[tuple[Mapping[int, float], float | None]] = field(default_factory=list)

    def column(self, cost: float, whole: bool = False) -> int:
        self.cost.append(cost)
        self.whole.append(whole)
        return len(self.cost) - 1

    def row(self, terms: Mapping[int, float], equal: float | None = None) -> None:
        self.rows.append((terms, equal))

    def balance(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Two sums are equal."""
        terms = Counter(left)
        terms.subtract(right)
        self.row(terms, equal=0.0)

    def solve(self) -> tuple[np.ndarray | None, float]:
        """Values of the columns, if any were found that are whole where they should be, and the bound."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # loading it takes longer than most programs do
        from scipy.sparse import csr_array

        entries = [(v, i, j) for i, (terms, _) in enumerate(self.rows) for j, v in terms.items()]
        values, at, columns = zip(*entries, strict=True)
        matrix = csr_array((values, (at, columns)), shape=(len(self.rows), len(self.cost)))
        least = [-np.inf if equal is None else equal for _, equal in self.rows]
        most = [0.0 if equal is None else equal for _, equal in self.rows]
        scale = max(self.cost) or 1.0  # HiGHS's tolerances are absolute
        rows = LinearConstraint(matrix, least, most)  # pyright: ignore[reportArgumentType]
        told = {"bounds": Bounds(0, 1), "constraints": rows}
        relaxed = milp(np.array(self.cost) / scale, **told)
        parts = relaxed.x[self.whole]
        if np.abs(parts - parts.round()).max(initial=0) < 1e-6:
            return relaxed.x, relaxed.fun * scale
        limits = {"node_limit": BRANCHES, "mip_rel_gap": NEAR}
        branched = milp(np.array(self.cost) / scale, integrality=self.whole, options=limits, **told)
        if branched.x is None:
            return None, relaxed.fun * scale
        return branched.x, branched.mip_dual_bound * scale
