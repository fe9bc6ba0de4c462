"""One program for many sizes: `compile(..., dynamic=True)`.

A template (trace_sizes.py) says which numbers tracing put into the graph, as expressions of the arguments' sizes,
and for which sizes. What passes add is found by lowering the template at a few sizes: the programs must have the
same nodes, operators, layouts and moves, and each number that differs between them must be a constant plus a
multiple of one expression (or product of two) that the template holds. Else there is no family, and each size gets
a program of its own. Where programs differ only between sizes that the mesh divides and others, the family keeps
to sizes with the remainders it was made for.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import sympy
from torch.fx import Node

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.calls.call_keys import shapes_of
from shardc.compiler.driver.calls.passing import Taken
from shardc.compiler.driver.decide import Deciding
from shardc.compiler.driver.kept_gradients import Sync
from shardc.compiler.driver.tracing import Tracing
from shardc.compiler.errors import ShardingError
from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.node import set_specs, specs
from shardc.compiler.spec.rank_numbers import Local
from shardc.compiler.spec.spec import Spec
from shardc.compiler.trace.sizes.symbolic import Sized, Template, Values

log = logging.getLogger(__name__)
ENOUGH = 3  # other values of a size by which to see what depends on it
LIMIT = 8  # families per form of call; further sizes get a program each


class Unfit(Exception):
    """Why programs at several sizes are not one program."""


@dataclass(frozen=True)
class Formula:
    """plus + times x expr: an exact number at any sizes."""

    expr: sympy.Expr
    times: Fraction = Fraction(1)
    plus: Fraction = Fraction(0)
    kind: type = int

    def at(self, values: Values) -> Any:
        if self.kind is not int:
            return Sized(self.expr, self.kind).at(values)
        return _whole(self.plus + self.times * _exact(self.expr, values))


@dataclass
class Family:
    """A program, the sizes it was lowered at, and what becomes of its numbers at others."""

    program: Program
    template: Template
    base: Values
    formulas: dict[str, list[Any]]  # per node: a number or Formula for each number in it
    kept: Mapping[sympy.Symbol, int]  # sizes that keep their remainder by this, and are at least it
    fixed: tuple[sympy.Symbol, ...]  # sizes of which no other value was found that takes the same path
    tied: Mapping[sympy.Symbol, sympy.Symbol]  # sizes that are equal to others

    def solve(self, shapes: Sequence[Sequence[int]]) -> dict[sympy.Symbol, int] | None:
        values = self.template.solve(shapes)
        if values is None:
            return None
        same = all(values[s] >= n and (values[s] - self.base[s]) % n == 0 for s, n in self.kept.items())
        equal = all(values[a] == values[b] for a, b in self.tied.items())
        return values if same and equal and all(values[s] == self.base[s] for s in self.fixed) else None

    def at(self, values: Values) -> Program:
        """The program with its numbers as they are at these sizes."""
        gm = copy_graph(self.program.gm)
        for node in gm.graph.nodes:
            numbers = iter(_number(f, values) for f in self.formulas[node.name])
            place = _Places(lambda _, numbers=numbers: next(numbers))
            for name, held in _held(node):
                _put(node, name, place(held))
        return replace(self.program, gm=gm)

    def note(self) -> str:
        """For which sizes the program is, in words."""
        names = ", ".join(map(str, self.template.symbols))
        where = [str(c) for c in self.template.conditions] + [f"{s} = {self.base[s]}" for s in self.fixed]
        where += [f"{a} = {b}" for a, b in self.tied.items()]
        where += [f"{s} % {n} = {self.base[s] % n}" for s, n in self.kept.items()]
        return f"one program for all sizes {names} from 2 on" + (f" with {', '.join(where)}" if where else "")


@dataclass
class Families:
    """The families made so far, by the form of the call: all of it but its sizes."""

    tracing: Tracing
    deciding: Deciding
    made: dict[Any, list[Family]] = field(default_factory=dict)
    _taken: dict[Any, Any] = field(default_factory=dict)  # of what is passed in, by the form of the call

    def find(self, form: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program | None:
        """The program for a call of this form, if a family has one of its sizes. Its conditions hold: forward takes
        the path that its own call took, so what is passed in lies as it did then."""
        families = self.made.get(form, ())
        shapes = shapes_of(self.tracing.whole(args, kwargs, self._taken.get(form))) if families else ()
        for family in families:
            values = family.solve(shapes)
            if values is not None:
                with suppress(Unfit):  # a number would not be whole: not this family
                    return family.at(values)
        return None

    def hold(self, program: Program) -> bool:
        """Whether a program, or what was made of it for other sizes, can come again. What was made is no program."""
        return any(f.program.records is program.records for families in self.made.values() for f in families)

    def program(
        self, form: Any, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync, taken: Taken | None
    ) -> Program | None:
        """A program for this call from a trace for all sizes, and a family of it, where it is the same for others;
        None where the module cannot be traced so."""
        call = self.tracing.whole(args, kwargs, taken)
        template = self._template(call) if len(self.made.get(form, ())) < LIMIT else None
        values = template and template.solve(shapes_of(call))
        if template is None or values is None:
            return None
        known = Decisions()

        def lower(values: Values, like: Decisions) -> Program:
            return self.deciding.program(self.tracing.dressed(template.at(values), args, kwargs, taken), sync, like)

        program = lower(values, known)
        self._taken[form] = taken
        try:
            family = _family(program, template, values, lambda values: lower(values, Decisions(known)))
            self.made.setdefault(form, []).append(family)
            log.info("dynamic: %s", family.note())
        except Unfit as error:
            log.warning("dynamic: this program is for its own sizes only: %s", error)
        return program

    def _template(self, call: tuple[Any, Any]) -> Template | None:
        try:
            traced = self.tracing.symbolic(call)
            return Template.of(traced.gm, traced.signature)
        except ShardingError as error:
            log.warning("dynamic: each size gets a program of its own, as %s", error)
            return None


def _family(program: Program, template: Template, base: Values, make: Callable[[Values], Program]) -> Family:
    """Look at other sizes: first whether it matters that the mesh divides them, one group of symbols at a time, then
    at sizes where all differ."""
    size = program.mesh.size
    rows, shape = [(base, program)], _skeleton(program)
    lower = _Lowered(make)
    groups = _groups(template, base, lower)
    kept: dict[sympy.Symbol, int] = {}
    for group in groups if size > 1 else ():
        others = [(v, made) for v in _others(template, base, group, size) if (made := lower(v)) is not None]
        if others and all(_skeleton(other) == shape for _, other in others):
            rows += others
        else:
            kept |= dict.fromkeys(group, size)
    moves = {g: near for g in groups if len(near := _nearby(template, base, g, kept.get(g[0], 1))) >= ENOUGH}
    if not moves:
        raise Unfit("no other sizes take the same path")
    for values in _mixed(template, base, moves):
        other = lower(values)
        if other is None:
            raise Unfit("at other sizes it cannot be sharded")
        if (found := _skeleton(other)) != shape:
            raise Unfit(_difference([shape, found]))
        rows.append((values, other))
    tied = {s: group[0] for group in moves for s in group[1:]}
    fixed = tuple(s for s in base if not any(s in group for group in moves))
    return Family(program, template, base, _fitted(rows, template, tied), kept, fixed, tied)


class _Lowered:
    """Programs by sizes; None where an operator's rule finds sizes that do not fit each other, of which tracing knows
    nothing: the rows of keys and of values."""

    def __init__(self, lower: Callable[[Values], Program]) -> None:
        self._lower, self._made = lower, dict[tuple, Program | None]()

    def __call__(self, values: Values) -> Program | None:
        key = tuple(values.items())
        if key not in self._made:
            try:
                self._made[key] = self._lower(values)
            except ShardingError:
                self._made[key] = None
        return self._made[key]


Group = tuple[sympy.Symbol, ...]  # symbols that change together


def _nearby(template: Template, base: Values, group: Group, step: int) -> list[int]:
    """Other values for a group, a multiple of `step` away, for which forward takes the same path."""
    values = [base[group[0]] + sign * k * step for k in range(1, 8) for sign in (1, -1)]
    return [n for n in values if n >= 2 and template.admits({**base, **dict.fromkeys(group, n)})]


def _groups(template: Template, base: Values, lower: _Lowered) -> list[Group]:
    """Each symbol that can change alone; one that cannot with others that are equal, if they can together: the rows
    of the tokens and of the targets."""

    def free(group: Group) -> bool:
        near = _nearby(template, base, group, 1)
        return len(near) >= ENOUGH and lower({**base, **dict.fromkeys(group, near[0])}) is not None

    found: list[Group] = [(s,) for s in base if free((s,))]
    stuck = [s for s in base if (s,) not in found]
    while stuck:
        first, *rest = stuck
        equal = [s for s in rest if base[s] == base[first]]
        groups = [(first, *more) for n in range(1, len(equal) + 1) for more in itertools.combinations(equal, n)]
        group = next(filter(free, groups), None)
        if group is not None:
            found.append(group)
        stuck = [s for s in rest if s not in (group or ())]
    return found


def _mixed(template: Template, base: Values, moves: Mapping[Group, Sequence[int]]) -> Sequence[Values]:
    """Sizes at which every group of symbols has other values than before, no two groups moving together."""
    draw, found = random.Random(0), list[Values]()
    for _ in range(300):
        values: Values = {**base, **{s: n for group, near in moves.items() for n in [draw.choice(near)] for s in group}}
        if all(values[g[0]] != f[g[0]] for f in found for g in moves) and template.admits(values):
            found.append(values)
        if len(found) == ENOUGH:
            return found
    raise Unfit("too few other sizes take the same path")


def _others(template: Template, base: Values, group: Group, size: int) -> Sequence[Values]:
    """Sizes of one group that the mesh divides where it does not divide the base, and the reverse; and small ones."""
    here = base[group[0]]
    near = sorted(range(2, here + 2 * size), key=lambda n: abs(n - here))
    across = [n for n in near if (n % size == 0) != (here % size == 0)]
    values = [{**base, **dict.fromkeys(group, n)} for n in dict.fromkeys([*across[:2], 2])]
    return [v for v in values if v != base and template.admits(v)][:2]


# --- a program's numbers, and the rest


class _Places:
    """A copy of a value with `number` applied to every number in it, in one order."""

    def __init__(self, number: Callable[[Any], Any], bare: bool = False) -> None:
        self._number, self._bare = number, bare  # bare: nodes by name, to compare

    def __call__(self, value: Any) -> Any:
        if type(value) in (int, float):
            return self._number(value)
        if isinstance(value, Node):
            return value.name if self._bare else value
        if isinstance(value, Spec):
            return Spec(self(value.dims), value.pending)
        if isinstance(value, Local):
            numbers = (self._number(n) for n in (value.times, value.plus, value.modulo))
            return Local(self(value.dim), value.kind, *numbers)
        if isinstance(value, slice):
            return slice(self(value.start), self(value.stop), self(value.step))
        if isinstance(value, (list, tuple)):
            items = [self(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {k: self(v) for k, v in value.items()}
        return value


def _held(node: Node) -> Iterator[tuple[str, Any]]:
    yield "args", node.args
    yield "kwargs", dict(node.kwargs)
    if specs(node):  # what runs a program reads sizes there; its value stays as it is at the base
        yield "specs", specs(node)


def _put(node: Node, name: str, value: Any) -> None:
    if name in ("args", "kwargs"):
        setattr(node, name, value)
    else:
        set_specs(node, value)


def _skeleton(program: Program) -> list[Any]:
    """A program without its numbers: equal for programs that do the same."""
    place = _Places(lambda n: "float" if type(n) is float else "int", bare=True)
    rows: list[Any] = [*((e.kind, e.name, e.node) for e in program.signature.inputs)]
    for node in program.gm.graph.nodes:
        rows.append((node.op, node.name, str(node.target), [(name, place(held)) for name, held in _held(node)]))
    return rows


def _numbers(program: Program) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in program.gm.graph.nodes:
        numbers = found.setdefault(node.name, [])
        place = _Places(lambda n, numbers=numbers: numbers.append(n) or n, bare=True)
        for _, held in _held(node):
            place(held)
    return found


def _difference(skeletons: Sequence[Sequence[Any]]) -> str:
    for rows in zip(*skeletons, strict=False):
        if any(row != rows[0] for row in rows):
            return f"at other sizes {rows[0][1]} is another operation, or lies otherwise"
    return "at other sizes there are more operations"


def _fitted(
    rows: Sequence[tuple[Values, Program]], template: Template, tied: Mapping[sympy.Symbol, sympy.Symbol]
) -> dict[str, list[Any]]:
    sizes, known = [values for values, _ in rows], _candidates(template, tied)
    found: dict[tuple, Any] = {}
    tables = [_numbers(p) for _, p in rows]
    out: dict[str, list[Any]] = {}
    for name, first in tables[0].items():
        out[name] = []
        for numbers in zip(first, *(t[name] for t in tables[1:]), strict=True):
            key = (type(numbers[0]), *numbers)
            if key not in found:
                found[key] = _formula(name, numbers, sizes, known, template)
            out[name].append(found[key])
    return out


def _candidates(template: Template, tied: Mapping[sympy.Symbol, sympy.Symbol]) -> list[sympy.Expr]:
    """What a number may be a multiple of: expressions of the template less their constants, and products of two."""
    expressions = [s.expr for s in template.expressions if s.kind is int] + list(template.symbols)
    single = dict.fromkeys(_direction(sympy.sympify(e.xreplace(dict(tied))), template) for e in expressions)
    several = [_direction(sympy.expand(a * b), template) for a, b in itertools.combinations_with_replacement(single, 2)]
    return list(dict.fromkeys([*single, *several]))


def _direction(expr: Any, template: Template) -> sympy.Expr:
    depends: Any = sympy.expand(expr).as_independent(*template.symbols, as_Add=True)[1]
    return depends.as_coeff_Mul()[1]


def _formula(
    name: str, numbers: Sequence[Any], sizes: Sequence[Values], known: Iterable[sympy.Expr], template: Template
) -> Any:
    """The one formula that gives these numbers at these sizes: what tracing put into the node itself, else what it
    put anywhere, else a multiple of such a thing and a constant."""
    if all(n == numbers[0] for n in numbers):
        return numbers[0]
    for given in (template.numbers.get(name, []), template.expressions):
        same = [s for s in given if s.kind is type(numbers[0]) and [s.at(v) for v in sizes] == list(numbers)]
        if len(same) == 1:
            return Formula(same[0].expr, kind=same[0].kind)
    fits = [] if type(numbers[0]) is float else _multiples(numbers, sizes, known)
    if len(fits) != 1:
        raise Unfit(f"{name} holds a number that depends on sizes in {'several ways' if fits else 'a way not known'}")
    return fits[0]


def _multiples(numbers: Sequence[int], sizes: Sequence[Values], known: Iterable[sympy.Expr]) -> list[Formula]:
    fits = []
    for expr in known:
        points = [_exact(expr, v) for v in sizes]
        i = next((i for i, p in enumerate(points) if p != points[0]), None)
        if i is None:
            continue
        times = Fraction(numbers[i] - numbers[0]) / (points[i] - points[0])
        plus = numbers[0] - times * points[0]
        if all(plus + times * p == n for p, n in zip(points, numbers, strict=True)):
            fits.append(Formula(expr, times, plus))
    return [f for f in fits if f.plus == 0] or fits


def _exact(expr: sympy.Expr, values: Values) -> Fraction:
    found = expr.xreplace({s: sympy.Integer(n) for s, n in values.items()})
    return Fraction(int(found.p), int(found.q))  # pyright: ignore[reportAttributeAccessIssue]


def _whole(n: Fraction) -> int:
    if n.denominator != 1:
        raise Unfit(f"{n} is no size")
    return int(n)


def _number(formula: Any, values: Values) -> Any:
    return formula.at(values) if isinstance(formula, Formula) else formula
