"""Proves a sharding rule by running its operator, and finds one by running it: for users' own operators.

shardc.rule("mylib::scale_rows", "n d, n -> n d", linear="0 | 1")
shardc.check_rule("mylib::scale_rows", torch.randn(5, 3), torch.randn(5))
shardc.discover_rule("mylib::scale_rows", torch.randn(5, 3), torch.randn(5))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.infer.decisions import decide_node
from shardc.compiler.ir.node import operands, set_spec, set_specs, set_val
from shardc.compiler.rules.ops import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.compiler.rules.table import OpRule, overload, rule_of, tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Part, Spec
from shardc.passes.pipeline import LOCALIZE
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import cut, join

RANKS = (2, 3, 4)


def check_rule(op: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Run every split that the operator's rule allows, over 2, 3 and 4 ranks, against the unsharded operator, and
    every pending sum that the rule lets pass. Sample sizes that are not divisible show uneven and empty pieces.

    op and its sample arguments: as one calls it. Returns what was proved, a line each. Raises ShardingError
    listing what does not hold, or saying that the operator has no rule.
    """
    target = overload(op)
    result = target(*args, **kwargs)
    rule = rule_of(target, args, kwargs, result)
    if rule is None:
        line = f'shardc.rule("{target}", "... -> ...")'
        raise ShardingError(f"{target} has no sharding rule", help=f"register one: {line}")
    proved, failed = [], []
    for what, layouts, ranks in _claims(rule, args, kwargs):
        fault = _fault(target, args, kwargs, layouts, Mesh(x=ranks), result)
        (failed if fault else proved).append(f"{what} over {ranks} ranks" + (f": {fault}" if fault else ""))
    if failed:
        raise ShardingError(f"the rule of {target} is wrong", rule=rule.text, excerpt="\n".join(failed))
    return proved


def _claims(rule: OpRule, args: Any, kwargs: Any) -> Iterator[tuple[str, list[Spec], int]]:
    """(claim in words, layouts that the operands arrive in, ranks)."""
    whole = [Spec.whole(t.shape) for t in tensors_in(args, kwargs)]
    for factor, ranks in itertools.product(rule.factors(), RANKS):
        at = next(((i, d) for i, t in enumerate(rule.operands) for d, dim in enumerate(t) if factor in dim), None)
        if at is None or factor in rule.whole:
            continue
        i, d = at
        parts = tuple(Part(rule.size(f), ("x",) if f == factor else ()) for f in rule.operands[i][d])
        yield f"splitting {factor}", [s.with_dim(d, parts) if j == i else s for j, s in enumerate(whole)], ranks
    for group in rule.linear:
        layouts = [Spec(s.dims, (("x", "sum"),)) if j in group else s for j, s in enumerate(whole)]
        yield f"a pending sum in operands {sorted(group)}", layouts, 2


def _fault(target: Any, args: Any, kwargs: Any, layouts: list[Spec], mesh: Mesh, want: Any) -> str:
    """What goes wrong when the call runs sharded so; empty where nothing does."""
    gm, call = _graph(target, args, kwargs, want)
    decision = decide_node(call, [Spec(s.dims, s.pending) for s in layouts], mesh)
    inputs = operands(call)
    for node, spec in zip(inputs, decision.operands, strict=True):
        set_spec(node, spec)
    set_specs(call, decision.results)
    LOCALIZE.run_on(gm, mesh)
    values = tensors_in(args, kwargs)
    coords = [mesh.coords(r) for r in range(mesh.size)]
    pieces = [[_piece(x, spec, mesh, at) for at in coords] for x, spec in zip(values, decision.operands, strict=True)]
    try:
        found = simulate(gm, mesh, pieces)[0]
        joined = [join([tensors_in(p)[i] for p in found], spec, mesh) for i, spec in enumerate(decision.results)]
    except (RuntimeError, IndexError, TypeError) as error:
        return f"does not run on the pieces: {error}"
    for i, (have, expected) in enumerate(zip(joined, tensors_in(want), strict=True)):
        if have.shape != expected.shape or not torch.allclose(have, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"result {i} differs"
    return ""


def _piece(x: Tensor, spec: Spec, mesh: Mesh, at: dict[str, int]) -> Tensor:
    """A rank's piece; of a pending sum a random summand, so that what is not linear shows."""
    piece = cut(x, Spec(spec.dims), mesh, at)
    if not spec.pending:
        return piece
    share = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return share if at["x"] else x - share


def _graph(target: Any, args: Any, kwargs: Any, result: Any) -> tuple[GraphModule, Node]:
    graph = Graph()

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder(f"x{len(graph.nodes)}")
        set_val(node, x)
        return node

    new_args, new_kwargs = pytree.tree_map(leaf, (args, kwargs))
    call = graph.call_function(target, new_args, new_kwargs)
    set_val(call, result)
    graph.output((call,))
    return GraphModule({}, graph), call


def discover_rule(op: Any, *args: Any, **kwargs: Any) -> str:
    """Find a rule by running the operator on halves of its operands, print it in factor notation and return it.

    Every dim that can be split, together with which dims of other operands, and how the results join (along a
    dim, or as a sum). Sample sizes should differ from dim to dim, and be even. What cannot be split is `whole`.
    """
    target = overload(op)
    values, results = tensors_in(args, kwargs), tensors_in(target(*args, **kwargs))
    names: dict[tuple[int, int], str] = {}
    results_names: dict[tuple[int, int], str] = {}
    summed: list[str] = []
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    for i, x in enumerate(values):
        for d in range(x.dim()):
            found = None if (i, d) in names else _split_of(target, args, kwargs, values, results, (i, d), names)
            if found is None:
                continue
            dims, joins = found
            name = next(letters)
            names |= {place: name for place in dims}
            results_names |= {(r, join): name for r, join in enumerate(joins) if isinstance(join, int)}
            if "sum" in joins:
                summed.append(name)
    text = _notation(values, results, names, results_names, letters)
    options = [f'sum="{" ".join(summed)}"'] if summed else []
    whole = sorted(set(text.replace("->", " ").replace(",", " ").split()) - set(names.values()) - {"1", "_"})
    options += [f'whole="{" ".join(whole)}"'] if whole else []
    name = str(target).removesuffix(".default").replace(".", "::", 1)
    line = f'shardc.rule("{name}", "{text}"' + "".join(f", {o}" for o in options) + ")"
    print(line)
    return line


def _split_of(
    target: Any, args: Any, kwargs: Any, values: list[Tensor], results: list[Tensor], seed: tuple[int, int], taken: dict
) -> tuple[list[tuple[int, int]], list[int | str]] | None:
    """The operand dims that split together with `seed`, and how each result joins; None if it cannot be split."""
    size = values[seed[0]].shape[seed[1]]
    if size < 2:
        return None
    choices: list[list[tuple[int, int] | None]] = []
    for j, y in enumerate(values):
        equal = [(j, e) for e in range(y.dim()) if y.shape[e] == size and (j, e) not in taken]
        choices.append([seed] if j == seed[0] else [*equal, None])
    for dims in itertools.product(*choices):
        halves = [_run_half(target, args, kwargs, values, dims, half) for half in (0, 1)]
        if None in halves:
            continue
        joins = [_join(a, b, want) for a, b, want in zip(*halves, results, strict=True)]  # pyright: ignore
        if None not in joins:
            return [d for d in dims if d is not None], joins  # pyright: ignore[reportReturnType]
    return None


def _run_half(
    target: Any, args: Any, kwargs: Any, values: list[Tensor], dims: Sequence[Any], half: int
) -> list[Tensor] | None:
    pieces = iter([y if d is None else y.chunk(2, d[1])[half] for y, d in zip(values, dims, strict=True)])
    new_args, new_kwargs = pytree.tree_map(lambda x: next(pieces) if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        return tensors_in(target(*new_args, **new_kwargs))
    except (RuntimeError, IndexError, ValueError):
        return None  # the operator itself refuses such pieces: they do not split together


def _join(a: Tensor, b: Tensor, want: Tensor) -> int | str | None:
    for d in range(want.dim()):
        if a.shape[d] + b.shape[d] == want.shape[d] and _close(a, b, want, d):
            return d
    if a.shape == b.shape == want.shape and a.dtype == want.dtype and torch.allclose(a + b, want, rtol=1e-4, atol=1e-5):
        return "sum"
    return None


def _close(a: Tensor, b: Tensor, want: Tensor, d: int) -> bool:
    try:
        joined = torch.cat([a, b], d)
    except RuntimeError:
        return False
    return joined.shape == want.shape and torch.allclose(joined, want, rtol=1e-4, atol=1e-5, equal_nan=True)


def _notation(
    values: list[Tensor], results: list[Tensor], names: dict, results_names: dict, letters: Iterator[str]
) -> str:
    def side(tensors: list[Tensor], known: dict) -> str:
        out = []
        for i, t in enumerate(tensors):
            dims = [known.get((i, d)) or ("1" if t.shape[d] == 1 else next(letters)) for d in range(t.dim())]
            out.append(" ".join(dims) or "_")
        return ", ".join(out)

    return f"{side(values, names)} -> {side(results, results_names)}"
