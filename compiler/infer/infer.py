"""Marries factors to mesh dims: from the layouts of an operator's operands to those it needs and gives.

The algorithm is written once; what differs between operators is their rule. For every mesh dim the
operands propose what it could split; the proposal that moves the fewest bytes wins. Propagation
extends and never invents: a factor is split only if some operand already is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shardc.compiler.rules.table import OpRule
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Dim, Part, Spec, axes_of, canonical, chunk, regroup, restrict

T = TypeVar("T")
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
    found = [splits_of(names, spec, rule, mesh) for names, spec in zip(rule.operands, specs, strict=True)]
    if rule.follows:
        found = [{rule.leader(name): dim for name, dim in factors.items()} for factors in found]
    choices: dict[str, str | None] = {}
    groups: dict[str, frozenset[int]] = {}
    for axis in axes:
        choices[axis], groups[axis] = _choose(axis, rule, specs, found, nbytes, mesh, axis in put_off)
        if before is not None and (again := dict(before.choices).get(axis, MISSING)) is not MISSING:
            if again in (None, PENDING) or any(again in f for f in found):
                choices[axis], groups[axis] = again, dict(before.passing)[axis]  # pyright: ignore
    return arrange(rule, choices, groups, found, nbytes, mesh)


def arrange(
    rule: OpRule,
    choices: dict[str, str | None],
    groups: Mapping[str, frozenset[int]],
    found: Sequence[dict[str, Dim]],
    nbytes: Sequence[int],
    mesh: Mesh,
) -> Decision:
    """The layouts of a call that follow from what each mesh dim does in it. found: how its operands split factors; a
    factor that none of them splits so is split plainly. groups: mesh dim -> through which operands a sum passes."""
    factors = dict(_whole(rule))
    chosen = set(choices.values())
    for f in factors:
        if rule.leader(f) in chosen:
            factors[f] = _merge(rule.leader(f), rule, choices, found, nbytes, mesh)
    for name in (name for pair in rule.follows for name in pair):
        factors[name] = (Part(rule.size(name), axes_of(factors[name])),)
    passed = {a: "sum" for a, c in choices.items() if c == PENDING}
    summed = {a: "sum" for f, op in rule.reductions if op == "sum" and rule.once for a in axes_of(factors[f])}
    operands = tuple(
        _lay_out(names, factors, _pending(passed, groups, i) | (summed if i in rule.once else {}), mesh)
        for i, names in enumerate(rule.operands)
    )
    results = tuple(_result(names, factors, passed, rule, mesh) for names in rule.results)
    return Decision(tuple(factors.items()), operands, results, tuple(choices.items()), tuple(groups.items()))


def _pending(passed: Mapping[str, str], groups: Mapping[str, frozenset[int]], operand: int) -> dict[str, str]:
    return {axis: op for axis, op in passed.items() if operand in groups[axis]}


def decided(rule: OpRule, operands: Sequence[Spec], results: Sequence[Spec], mesh: Mesh) -> Decision:
    """The decision that a call with these layouts comes from."""
    factors = dict(_whole(rule))
    for names, layout in zip((*rule.operands, *rule.results), (*operands, *results), strict=True):
        for dim_names, dim in zip(names, layout.dims, strict=True):
            groups = regroup(dim, tuple([rule.size(n) for n in dim_names]), mesh) if axes_of(dim) else None
            factors |= {name: group for name, group in zip(dim_names, groups or (), strict=False) if axes_of(group)}
    return Decision(tuple(factors.items()), tuple(operands), tuple(results), ())


def _whole(rule: OpRule) -> tuple[tuple[str, Dim], ...]:
    return tuple((f, (Part(rule.size(f)),)) for f in rule.factors())


def _shapes(tensors: Sequence[tuple], rule: OpRule) -> tuple[Spec, ...]:
    """Layouts of tensors that every rank holds whole."""
    return tuple(Spec.whole([math.prod([rule.size(f) for f in dim]) for dim in names]) for names in tensors)


def _axes(specs: Sequence[Spec], mesh: Mesh) -> list[str]:
    used = {a for s in specs for a in s.axes()} | {a for s in specs for a, _ in s.pending}
    return [a for a in mesh.names if a in used] if used else []


def splits_of(names: tuple, spec: Spec, rule: OpRule, mesh: Mesh) -> dict[str, Dim]:
    """How this operand splits each factor. Of a dim whose split crosses factor borders, as many mesh dims as fit."""
    out = {}
    for dim_names, dim in zip(names, spec.dims, strict=True):
        if not dim_names or not axes_of(dim):
            continue
        groups = _groups(dim, tuple([rule.size(n) for n in dim_names]), mesh)
        for name, group in zip(dim_names, groups or (), strict=False):
            if axes_of(group) and may_split(name, group, rule, mesh):
                out[name] = group
    return out


def _groups(dim: Dim, sizes: tuple[int, ...], mesh: Mesh) -> tuple[Dim, ...] | None:
    """The dim as its factors, without its innermost mesh dims where they cross a border between factors."""
    axes, groups = axes_of(dim), regroup(dim, sizes, mesh)
    while groups is None and axes:
        axes = axes[:-1]
        groups = regroup(restrict(dim, axes, mesh), sizes, mesh)
    return groups


def may_split(name: str, dim: Dim, rule: OpRule, mesh: Mesh) -> bool:
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
    group, held = passing(axis, rule, specs, nbytes), _held(axis, specs)
    contracted = {name for name, _ in rule.reductions if not all(_has(name, dims, rule) for dims in rule.results)}
    proposals: dict[str | None, float] = {}
    if group and (put_off or _is_worth_passing(rule, specs, held & group)):
        proposals[PENDING] = _cost(PENDING, axis, rule, state, group, nbytes, mesh)
    for s in state:
        if s not in (None, "lost", "pending") and s not in proposals:
            proposals[s] = _cost(s, axis, rule, state, frozenset(), nbytes, mesh)
            if rule.once and s in contracted:  # the sum is as large as what rows were to be added to
                proposals[s] += max(nbytes[i] for i in rule.once) * (mesh[axis] - 1) / mesh[axis]
    proposals[None] = _cost(None, axis, rule, state, frozenset(), nbytes, mesh)
    free = [c for c, cost in proposals.items() if cost == 0]
    if free:
        return free[0], group
    largest = max(nbytes, default=0)

    def total(choice: str | None) -> float:
        return proposals[choice] + (2 * largest if choice in contracted else 0)

    return min(proposals, key=total), group


def passing(axis: str, rule: OpRule, specs: Sequence[Spec], nbytes: Sequence[int]) -> frozenset[int]:
    """The operands through which a sum over a mesh dim may pass; none where it may not.

    Whole operands smaller than the pending one, such as a bias, join it: one rank adds it for all."""
    held = _held(axis, specs)
    size = max((nbytes[i] for i in held), default=0)
    small = {i for i, s in enumerate(specs) if axis not in s.axes() and not s.reduction(axis) and nbytes[i] < size}
    return next((g for g in rule.linear if g <= held | small and g & held), frozenset())


def _held(axis: str, specs: Sequence[Spec]) -> set[int]:
    return {i for i, s in enumerate(specs) if s.reduction(axis) == "sum"}


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
    offers = [
        (restrict(f[factor], axes, mesh), size)
        for f, size in zip(found, nbytes, strict=True)
        if factor in f and any(a in axes for a in axes_of(f[factor]))
    ]
    offers.sort(key=lambda o: (-len(axes_of(o[0])), -o[1]))
    offers += [((Part(rule.size(factor), (axis,)),), 0) for axis in axes if not _is_offered(axis, offers)]
    dim = offers[0][0]
    for other, _ in offers[1:]:
        missing = [a for a in axes_of(other) if a not in axes_of(dim)]
        if missing and len(dim) == len(other) == 1:
            more = canonical((Part(dim[0].size, (*dim[0].axes, *missing)),), mesh)
            dim = more if may_split(factor, more, rule, mesh) else dim
    return dim


def _is_offered(axis: str, offers: Sequence[tuple[Dim, int]]) -> bool:
    return any(axis in axes_of(dim) for dim, _ in offers)


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
