"""Marries factors to mesh dims: from the layouts of an operator's operands to those it needs and gives.

The algorithm is written once; what differs between operators is their rule. For every mesh dim the
operands propose what it could split; the proposal that moves the fewest bytes wins. Propagation
extends and never invents: a factor is split only if some operand already is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.node import nbytes, of, operands, tensors, val
from shardc.compiler.rules.table import TABLE, OpRule, RuleError, rule_of
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import named_shape
from shardc.compiler.spec.spec import Dim, Part, Spec, axes_of, canonical, chunk, regroup, restrict

MISSING = object()
PENDING = "+"  # the choice "let the pending sum pass", beside factor names and None


@dataclass(frozen=True)
class Decision:
    """One operator call laid out: each factor's split, the layouts it needs and gives, and why."""

    factors: tuple[tuple[str, Dim], ...]
    operands: tuple[Spec, ...]
    results: tuple[Spec, ...]
    choices: tuple[tuple[str, str | None], ...]  # (mesh dim, factor | PENDING | None)
    passing: tuple[tuple[str, frozenset[int]], ...] = ()  # mesh dim -> the operands through which a sum may pass

    def factor(self, name: str) -> Dim:
        return dict(self.factors)[name]


def decide(
    rule: OpRule,
    specs: Sequence[Spec],
    nbytes: Sequence[int],
    mesh: Mesh,
    put_off: Sequence[str] = (),
    before: Decision | None = None,
) -> Decision:
    """Lay out one call. specs and nbytes: per tensor operand, its layout and its global size in bytes. put_off:
    mesh dims over which a pending sum travels on even where it grows. before: what was decided of the same call at
    other sizes, and is decided again where it can be."""
    axes = _axes(specs, mesh)
    if not axes:  # nothing is split, and nothing gets split
        return Decision(_whole(rule), _shapes(rule.operands, rule), _shapes(rule.results, rule), ())
    found = [_factors_of(names, spec, rule, mesh) for names, spec in zip(rule.operands, specs, strict=True)]
    if rule.follows:
        found = [{rule.leader(name): dim for name, dim in factors.items()} for factors in found]
    choices: dict[str, str | None] = {}
    groups: dict[str, frozenset[int]] = {}
    for axis in axes:
        choices[axis], groups[axis] = _choose(axis, rule, specs, found, nbytes, mesh, axis in put_off)
        if before is not None and (again := dict(before.choices).get(axis, MISSING)) is not MISSING:
            if again in (None, PENDING) or any(again in f for f in found):
                choices[axis], groups[axis] = again, dict(before.passing)[axis]  # pyright: ignore
    factors = dict(_whole(rule))
    chosen = set(choices.values())
    for f in factors:
        if rule.leader(f) in chosen:
            factors[f] = _merge(rule.leader(f), rule, choices, found, nbytes, mesh)
    for name in (name for pair in rule.follows for name in pair):
        factors[name] = (Part(rule.size(name), axes_of(factors[name])),)
    passed = {a: "sum" for a, c in choices.items() if c == PENDING}
    operands = tuple(
        _lay_out(names, factors, {a: op for a, op in passed.items() if i in groups[a]}, mesh)
        for i, names in enumerate(rule.operands)
    )
    results = tuple(_result(names, factors, passed, rule, mesh) for names in rule.results)
    return Decision(tuple(factors.items()), operands, results, tuple(choices.items()), tuple(groups.items()))


def _whole(rule: OpRule) -> tuple[tuple[str, Dim], ...]:
    return tuple((f, (Part(rule.size(f)),)) for f in rule.factors())


def _shapes(tensors: Sequence[tuple], rule: OpRule) -> tuple[Spec, ...]:
    """Layouts of tensors that every rank holds whole."""
    return tuple(Spec.whole([math.prod([rule.size(f) for f in dim]) for dim in names]) for names in tensors)


class Decisions:
    """What was decided within one lowering: repeated layers are decided once.

    A rule is kept by all that it is made from, the operator, its static arguments, and what there is to know of its
    operands and results as tensors; a decision by the rule, the operands' layouts and bytes, the mesh, and where sums
    are put off. like: those of a lowering of the same graph at other sizes, which are taken over: what is less work
    there may not be here, but it is the same program.
    """

    def __init__(self, like: Decisions | None = None) -> None:
        self._like = like
        self._by_call: dict[Any, Decision] = {}
        self._once: dict[str, bool] = {}
        self._tensors: dict[int, tuple[torch.Tensor, tuple, int]] = {}  # held, so that no other gets its number
        self._rules: dict[Any, OpRule | None] = {}
        self._decided: dict[Any, tuple[OpRule, Decision]] = {}

    def __len__(self) -> int:
        return len(self._decided)

    def rule(self, node: Node) -> OpRule | None:
        """As `call_rule`."""
        seen: dict[int, int] = {}
        try:
            call = self._frozen((node.args, node.kwargs, val(node)), seen)
            key = (node.target, TABLE.get(node.target), call)
            known = key in self._rules
        except TypeError:  # an argument that has no hash, as a slice
            return _rule(node)
        if not known:
            self._rules[key] = _rule(node)
        return self._rules[key]

    def decide(self, rule: OpRule, node: Node, specs: Sequence[Spec], mesh: Mesh, put_off: Sequence[str]) -> Decision:
        """As `decide`, of a node that has this rule."""
        sizes = [self._of(val(n))[2] for n in operands(node)]
        call = (node.name, tuple([(tuple([axes_of(d) for d in s.dims]), s.pending) for s in specs]))
        before = self._like._by_call.get(call) if self._like is not None else None
        key = (id(rule), tuple(specs), tuple(sizes), mesh, tuple(put_off), before and (before.choices, before.passing))
        if key not in self._decided:
            self._decided[key] = rule, decide(rule, specs, sizes, mesh, put_off, before)
        found = self._by_call[call] = self._decided[key][1]
        return found

    def once(self, question: str, answer: Callable[[], bool]) -> bool:
        """What else depends on sizes, asked of one lowering: as it was answered at the other sizes, if it was."""
        if self._like is not None and question in self._like._once:
            return self._like._once[question]
        return self._once.setdefault(question, answer())

    def _of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple, int]:
        known = self._tensors.get(id(tensor))
        if known is None:
            strides = tensor.stride() if tensor.layout is torch.strided else ()
            form = (type(tensor), tuple(tensor.shape), strides, tensor.dtype, tensor.device, tensor.layout)
            flags = (tensor.storage_offset() if strides else 0, tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
            known = self._tensors[id(tensor)] = tensor, form + flags, tensor.numel() * tensor.element_size()
        return known

    def _frozen(self, tree: Any, seen: dict[int, int]) -> Any:
        """Arguments as a key: 1, 1.0 and True are three, and so are one tensor twice and two that are alike."""
        if isinstance(tree, Node):
            tree = val(tree)
        if isinstance(tree, torch.Tensor):
            return seen.setdefault(id(tree), len(seen)), self._of(tree)[1]
        if isinstance(tree, (list, tuple)):
            return type(tree), *[self._frozen(item, seen) for item in tree]
        if isinstance(tree, dict):
            return tuple([(key, self._frozen(item, seen)) for key, item in tree.items()])
        return type(tree), repr(tree) if isinstance(tree, (float, complex)) else tree


def call_rule(node: Node, known: Decisions | None = None) -> OpRule | None:
    """The rule of one call in a graph, fitted to its shapes; None for an operator without one, and where data decides
    sizes or numbers. Raises ShardingError at the user's line where the rule does not fit this call."""
    view = of(node)
    if view.data:
        return None
    if "rule" not in view:
        view.rule = _rule(node) if known is None else known.rule(node)
    return view.rule


def _rule(node: Node) -> OpRule | None:
    args, kwargs = map_arg((node.args, node.kwargs), val)
    try:
        return rule_of(node.target, args, kwargs, val(node))
    except RuleError as error:
        raise ShardingError(
            f"{node.target} cannot be sharded as it is called here: {error}",
            where=of(node).where,
            help="write it with other operators, or correct its rule (shardc.check_rule proves one)",
        ) from error


def decide_node(
    node: Node, specs: Sequence[Spec], mesh: Mesh, put_off: Sequence[str] = (), known: Decisions | None = None
) -> Decision:
    """Lay out one call of a graph; an operator without a rule gets whole operands. put_off: as in `decide`."""
    rule = call_rule(node, known)
    if rule is None:
        whole = tuple(Spec.whole(named_shape(t)) for t in tensors(node))
        return Decision((), tuple(Spec.whole(s.shape) for s in specs), whole, ())
    if known is not None:
        return known.decide(rule, node, specs, mesh, put_off)
    return decide(rule, specs, [nbytes(n) for n in operands(node)], mesh, put_off)


def _axes(specs: Sequence[Spec], mesh: Mesh) -> list[str]:
    used = {a for s in specs for a in s.axes()} | {a for s in specs for a, _ in s.pending}
    return [a for a in mesh.names if a in used] if used else []


def _factors_of(names: tuple, spec: Spec, rule: OpRule, mesh: Mesh) -> dict[str, Dim]:
    """How this operand splits each factor. Of a dim whose split crosses factor borders, as many mesh dims as fit."""
    out = {}
    for dim_names, dim in zip(names, spec.dims, strict=True):
        if not dim_names or not axes_of(dim):
            continue
        groups = _groups(dim, tuple([rule.size(n) for n in dim_names]), mesh)
        for name, group in zip(dim_names, groups or (), strict=False):
            if axes_of(group) and _may_split(name, group, rule, mesh):
                out[name] = group
    return out


def _groups(dim: Dim, sizes: tuple[int, ...], mesh: Mesh) -> tuple[Dim, ...] | None:
    """The dim as its factors, without its innermost mesh dims where they cross a border between factors."""
    axes, groups = axes_of(dim), regroup(dim, sizes, mesh)
    while groups is None and axes:
        axes = axes[:-1]
        groups = regroup(restrict(dim, axes, mesh), sizes, mesh)
    return groups


def _may_split(name: str, dim: Dim, rule: OpRule, mesh: Mesh) -> bool:
    if name in rule.whole or (name in rule.plain and len(dim) > 1):
        return False
    if name in rule.lone and len(axes_of(dim)) > 1:
        return False
    if not rule.nonempty:
        return True
    tied = [f for f in rule.nonempty if rule.leader(f) == rule.leader(name)]
    return not any(may_be_empty(dim if f == name else (Part(rule.size(f), axes_of(dim)),), mesh) for f in tied)


def may_be_empty(dim: Dim, mesh: Mesh) -> bool:
    """Whether some rank holds no index of the dim: then one at the last coordinates does."""
    last = {axis: mesh[axis] - 1 for axis in axes_of(dim)}
    return any(chunk(part.size, mesh, part.axes, last)[1] == 0 for part in dim)


def _choose(
    axis: str,
    rule: OpRule,
    specs: Sequence[Spec],
    found: Sequence[dict[str, Dim]],
    nbytes: Sequence[int],
    mesh: Mesh,
    put_off: bool,
) -> tuple[str | None, frozenset[int]]:
    """What this mesh dim does in the call: split a factor, carry a pending sum, or nothing."""
    state = [_state(axis, spec, f) for spec, f in zip(specs, found, strict=True)]
    held = {i for i, s in enumerate(specs) if s.reduction(axis) == "sum"}
    joining = held | _small(state, max((nbytes[i] for i in held), default=0), nbytes)
    group = next((g for g in rule.linear if g <= joining and g & held), frozenset())
    proposals: dict[str | None, float] = {}
    if group and (put_off or _is_worth_passing(rule, specs, held & group)):
        proposals[PENDING] = _cost(PENDING, axis, rule, state, group, nbytes, mesh)
    for s in state:
        if s not in (None, "lost", "pending") and s not in proposals:
            proposals[s] = _cost(s, axis, rule, state, frozenset(), nbytes, mesh)
    proposals[None] = _cost(None, axis, rule, state, frozenset(), nbytes, mesh)
    free = [c for c, cost in proposals.items() if cost == 0]
    if free:
        return free[0], group
    contracted = {name for name, _ in rule.reductions if not all(_has(name, dims, rule) for dims in rule.results)}
    largest = max(nbytes, default=0)

    def total(choice: str | None) -> float:
        return proposals[choice] + (2 * largest if choice in contracted else 0)

    return min(proposals, key=total), group


def _small(state: Sequence[str | None], size: int, nbytes: Sequence[int]) -> set[int]:
    """Whole operands smaller than the pending one, such as a bias: one rank adds it for all, and the sum stays
    pending until something needs it whole or split."""
    return {i for i, (s, n) in enumerate(zip(state, nbytes, strict=True)) if s is None and n < size}


def _is_worth_passing(rule: OpRule, specs: Sequence[Spec], held: frozenset[int] | set[int]) -> bool:
    """Whether reducing later costs no more: one result, no larger than the pending operand it comes from."""
    if len(rule.results) != 1:
        return False
    sizes = dict(rule.sizes)
    result = math.prod(sizes[name] for dim in rule.results[0] for name in dim)
    return result <= max(math.prod(specs[i].shape) for i in held)


def _state(axis: str, spec: Spec, factors: dict[str, Dim]) -> str | None:
    """What an operand does with a mesh dim: the factor it splits, "pending", "lost" (unusable split) or None."""
    if spec.reduction(axis):
        return "pending"
    if axis not in spec.axes():
        return None
    return next((name for name, dim in factors.items() if axis in axes_of(dim)), "lost")


def _cost(
    choice: str | None,
    axis: str,
    rule: OpRule,
    state: Sequence[str | None],
    group: frozenset[int],
    nbytes: Sequence[int],
    mesh: Mesh,
) -> float:
    """Bytes on the wire, per rank, to bring every operand to what the choice needs of it."""
    n = mesh[axis]
    share, total = (n - 1) / n, 0.0
    for i, (now, names, size) in enumerate(zip(state, rule.operands, nbytes, strict=True)):
        if choice == PENDING and i in group or now is None or now == choice:
            continue
        has = _has(choice, names, rule)
        if now == "pending":
            total += (1 if has else 2) * share * size
        else:
            total += share * size / (n if has else 1)
    return total


def _has(factor: str | None, names: tuple, rule: OpRule) -> bool:
    """Whether a tensor with these dims is split where this factor is."""
    return any(factor == rule.leader(name) for dim in names for name in dim)


def _merge(
    factor: str,
    rule: OpRule,
    choices: dict[str, str | None],
    found: Sequence[dict[str, Dim]],
    nbytes: Sequence[int],
    mesh: Mesh,
) -> Dim:
    """One split of a factor that honours every mesh dim that chose it, as far as the operands' splits agree."""
    axes = [a for a, c in choices.items() if c == factor]
    whole = (Part(rule.size(factor)),)
    offers = [
        (restrict(f[factor], axes, mesh), size)
        for f, size in zip(found, nbytes, strict=True)
        if factor in f and any(a in axes for a in axes_of(f[factor]))
    ]
    if not offers:
        return whole
    offers.sort(key=lambda o: (-len(axes_of(o[0])), -o[1]))
    dim = offers[0][0]
    for other, _ in offers[1:]:
        missing = [a for a in axes_of(other) if a not in axes_of(dim)]
        if missing and len(dim) == len(other) == 1:
            more = canonical((Part(dim[0].size, (*dim[0].axes, *missing)),), mesh)
            dim = more if _may_split(factor, more, rule, mesh) else dim
    return dim


def _lay_out(names: tuple, factors: dict[str, Dim], pending: dict[str, str], mesh: Mesh) -> Spec:
    dims = [
        canonical(tuple([part for name in dim for part in factors[name]]), mesh) if dim else (Part(1),) for dim in names
    ]
    return Spec(tuple(dims), tuple([(a, pending[a]) for a in mesh.names if a in pending]) if pending else ())


def _result(names: tuple, factors: dict[str, Dim], passed: dict[str, str], rule: OpRule, mesh: Mesh) -> Spec:
    pending = dict(passed)
    if rule.reductions:
        written = {rule.leader(name) for dim in names for name in dim}
        for factor, op in rule.reductions:
            if rule.leader(factor) not in written:
                pending |= {axis: op for axis in axes_of(factors[factor])}
    return _lay_out(names, factors, pending, mesh)
