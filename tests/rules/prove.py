"""The proof of a rule: split what may be split, run the operator on the pieces, join as it says, compare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from shardc.compiler.infer.infer import Decision, decide
from shardc.compiler.rules.table import OpRule, RuleError, fit, tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Dim, Part, Spec, axes_of, canonical
from tests.rules.eager_site import run_ranks
from tests.rules.pieces import cut, indices, join, same, shares

Claim = tuple[str, Mesh, Decision]


def prove(
    build: Callable[..., OpRule], op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """What is false about the rule for this one call; no line where it holds.

    Each factor that may be split is split over 2, 3 and 4 ranks, plainly and inside its halves, and together
    with the next factor; each `linear=` group is made pending over 2 and 3 ranks.
    """
    kwargs = kwargs or {}
    operands, whole = tensors_in(args, kwargs), tensors_in(op(*args, **kwargs))
    try:
        made = build(*args, **kwargs, results=whole)
        rule = fit(made, [t.shape for t in operands], [t.shape for t in whole])
    except RuleError as error:
        return [f"the rule does not fit: {error}"]
    failures = []
    for label, mesh, decision in (*_splits(rule), *_pendings(rule, operands)):
        found = _decided_otherwise(rule, decision, mesh)
        found = found or _false(rule, decision, mesh, op, (args, kwargs), whole)
        failures += [f"{label}: {found}"] if found else []
    return failures


def _splits(rule: OpRule) -> Iterator[Claim]:
    """Every factor by itself over several meshes, then neighbours over two mesh dims."""
    free = [f for f in rule.factors() if f not in rule.whole and rule.leader(f) == f]
    for f, ways in itertools.product(free, (2, 3, 4)):
        n, mesh = rule.size(f), Mesh(x=ways)
        dims = [canonical((Part(n, ("x",)),), mesh)]
        if n > 2 and n % 2 == 0 and f not in rule.plain:
            dims.append(canonical((Part(2), Part(n // 2, ("x",))), mesh))
        for dim in dict.fromkeys(dims):
            if _allowed(rule, f, dim, mesh):
                yield f"{f} over {ways} ranks", mesh, by_hand(rule, {f: dim}, mesh)
    mesh = Mesh(x=2, y=2)
    for f, g in itertools.pairwise(free):
        dims = {f: (Part(rule.size(f), ("x",)),), g: (Part(rule.size(g), ("y",)),)}
        if all(_allowed(rule, name, dim, mesh) for name, dim in dims.items()) and not _two_ways(rule, f, g):
            yield f"{f} and {g} over 2 x 2 ranks", mesh, by_hand(rule, dims, mesh)


def _allowed(rule: OpRule, factor: str, dim: Dim, mesh: Mesh) -> bool:
    tied = [f for f in rule.nonempty if rule.leader(f) == factor]
    held = [dim if f == factor else (Part(rule.size(f), axes_of(dim)),) for f in tied]
    return all(indices(d, mesh, mesh.coords(r)) for d in held for r in range(mesh.size))


def _two_ways(rule: OpRule, f: str, g: str) -> bool:
    """Whether the two would leave a result pending in two ways, which no layout is asked to express yet."""
    reductions = dict(rule.reductions)
    return f in reductions and g in reductions and reductions[f] != reductions[g]


def _pendings(rule: OpRule, operands: Sequence[torch.Tensor]) -> Iterator[Claim]:
    for group, ways in itertools.product(rule.linear, (2, 3)):
        if any(operands[i].dtype == torch.bool for i in group):
            continue
        mesh = Mesh(x=ways)
        plain = by_hand(rule, {}, mesh)
        specs = tuple(s.with_pending({"x": "sum"}, mesh) if i in group else s for i, s in enumerate(plain.operands))
        results = tuple(s.with_pending({"x": "sum"}, mesh) for s in plain.results)
        yield f"pending {sorted(group)} over {ways} ranks", mesh, Decision(plain.factors, specs, results, ())


def by_hand(rule: OpRule, dims: Mapping[str, Dim], mesh: Mesh) -> Decision:
    """What the rule says of a call whose factors are split so, without the search that infer makes."""
    factors = {f: dims.get(f, (Part(rule.size(f)),)) for f in rule.factors()}
    for f, leader in rule.follows:
        factors[f] = (Part(rule.size(f), axes_of(factors[leader])),)

    def lay_out(names: Sequence[Sequence[str]]) -> Spec:
        groups = [[part for f in dim for part in factors[f]] or [Part(1)] for dim in names]
        return Spec(tuple(canonical(tuple(group), mesh) for group in groups))

    def result(names: Sequence[Sequence[str]]) -> Spec:
        here = {rule.leader(f) for dim in names for f in dim}
        pending = {a: op for f, op in rule.reductions if rule.leader(f) not in here for a in axes_of(factors[f])}
        return lay_out(names).with_pending(pending, mesh)

    summed = {a: "sum" for f, op in rule.reductions if op == "sum" for a in axes_of(factors[f])}
    operands = tuple(
        lay_out(names).with_pending(summed if i in rule.once else {}, mesh) for i, names in enumerate(rule.operands)
    )
    return Decision(tuple(factors.items()), operands, tuple(result(n) for n in rule.results), ())


def _decided_otherwise(rule: OpRule, want: Decision, mesh: Mesh) -> str:
    """How infer.decide differs, given the first operand that takes part as wanted and the others whole.

    It need not let a sum pass that it could.
    """
    pending = any(s.pending for s in want.operands)
    specs = [s if pending else Spec.whole(s.shape) for s in want.operands]
    for axis in mesh.names:
        first = next((i for i, s in enumerate(want.operands) if axis in s.axes()), None)
        if first is not None:
            others = [a for a in want.operands[first].axes() if a != axis and a not in specs[first].axes()]
            specs[first] = want.operands[first]
            for a in others:
                specs[first] = specs[first].without(a, mesh)
        elif not pending:
            return ""  # only results have the factor: nothing proposes it
    got = decide(rule, specs, [1000] * len(specs), mesh)
    if got.operands == want.operands and got.results == want.results:
        return ""
    if pending and not any(s.pending for s in (*got.operands, *got.results)):
        return ""  # reducing before the call may be cheaper than after it
    return f"decide gives {_texts(got)} for {_texts(want)}"


def _texts(decision: Decision) -> str:
    return f"{', '.join(map(str, decision.operands))} -> {', '.join(map(str, decision.results))}"


def _false(
    rule: OpRule,
    decision: Decision,
    mesh: Mesh,
    op: Any,
    call: tuple[Any, Any],
    whole: Sequence[torch.Tensor],
) -> str:
    """What is wrong with the joined results of the local calls."""
    try:
        outs = run_ranks(op, rule, decision, mesh, _local_calls(decision, mesh, *call))
        per_rank = [[_written(op, t) for t in tensors_in(out)] for out in outs]
        for i, (expected, spec) in enumerate(zip(whole, decision.results, strict=True)):
            got = join([ts[i] for ts in per_rank], spec, mesh)
            if got.dtype != expected.dtype or any(ts[i].dtype != expected.dtype for ts in per_rank):
                return f"result {i} is {got.dtype}, not {expected.dtype}"
            if _has_values(op) and not same(got, expected):
                return f"result {i} differs as {spec}"
    except Exception as error:  # an operator may refuse its piece in any way
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _written(op: Any, result: torch.Tensor) -> torch.Tensor:
    """The result, or zeros for one that nobody has written yet."""
    return torch.zeros_like(result) if "empty" in op.__name__ else result


def _has_values(op: Any) -> bool:
    """Whether two equal calls give equal numbers: not for random and uninitialised tensors."""
    return torch.Tag.nondeterministic_seeded not in op.tags and "empty" not in op.__name__


def _local_calls(decision: Decision, mesh: Mesh, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    tensors = tensors_in(args, kwargs)
    over = [[axis for axis, _ in s.pending] for s in decision.operands]
    summands = [
        shares(t, math.prod(mesh[a] for a in axes)) if axes else [t] for t, axes in zip(tensors, over, strict=True)
    ]
    calls = []
    for rank in range(mesh.size):
        coords = mesh.coords(rank)
        mine = [t[_number(axes, coords, mesh)] for t, axes in zip(summands, over, strict=True)]
        local = iter(cut(t, s, mesh, coords) for t, s in zip(mine, decision.operands, strict=True))
        calls.append((swap(args, local), swap(kwargs, local)))
    return calls


def _number(axes: Sequence[str], coords: Mapping[str, int], mesh: Mesh) -> int:
    """A rank's place among those that hold summands of one tensor."""
    return sum(coords[axis] * math.prod(mesh[a] for a in axes[i + 1 :]) for i, axis in enumerate(axes))


def swap(tree: Any, leaves: Iterator[torch.Tensor]) -> Any:
    """The arguments with each tensor, in order, replaced by the next of `leaves`."""
    if isinstance(tree, torch.Tensor):
        return next(leaves)
    if isinstance(tree, (list, tuple)):
        return type(tree)(swap(x, leaves) for x in tree)
    if isinstance(tree, dict):
        return {k: swap(v, leaves) for k, v in tree.items()}
    return tree
