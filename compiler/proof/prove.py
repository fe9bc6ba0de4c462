"""A program proved against one device: outputs, every gradient, and every value in between.

Three runs on the same inputs: the original module under autograd; the program's graph at global shapes,
where every collective is an identity; and all ranks simulated. The first must equal the second at the
ends, the second the third at every value, on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from shardc.compiler.analysis.lowered import Lowered
from shardc.compiler.errors import ShardingError
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import inputs_of, placeholders, returned
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import of, specs, target_name, val
from shardc.compiler.ir.signature import InputKind, OutputKind
from shardc.compiler.ir.text import excerpt
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.rules.facts import RESHAPES
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.spec import Spec
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import cut, join

aten = torch.ops.aten

# Of a value's largest element: what another order of summing may change ...
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# ... and, in units of the dtype's precision, of the largest element on the way to it: where large terms
# cancel (the gradient of a key's bias is zero) only rounding is left, and rounding has no relative size.
ROUNDINGS = 64


def prove(program: Lowered, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """The largest relative difference found. Raises ShardingError at the first value that differs."""
    verify(program.gm, Stage.LOCAL, program.mesh)
    flat = program.original.inputs(args, kwargs)
    _check_shapes(program, flat)
    state = torch.get_rng_state()
    outputs, tangents, gradients = program.original.run(flat, [of(n).divided for n in placeholders(program.gm)])
    flat = [*flat, *tangents, *_nothing_kept(program)]
    reference: dict[str, Any] = {}
    torch.set_rng_state(state)
    ends = _global_run(program, flat, reference)
    after = torch.get_rng_state()
    ways = _ways(program, reference)
    _compare_ends(program, ends, outputs, gradients, ways)
    torch.set_rng_state(state)
    worst = _compare_ranks(program, flat, reference, ways)
    torch.set_rng_state(after)
    return worst


def _check_shapes(program: Lowered, flat: Sequence[Tensor]) -> None:
    for x, node, entry in zip(flat, placeholders(program.gm), program.signature.inputs, strict=False):
        wanted = tuple(val(node).shape)
        if tuple(x.shape) != wanted:
            raise ShardingError(
                f"{entry.name} has global shape {tuple(x.shape)}, and the program is for {wanted}",
                help="verify takes global inputs, of the shapes that the program was compiled for",
            )


def _global_run(program: Lowered, flat: list[Tensor], reference: dict[str, Any]) -> Sequence[Any]:
    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            reference[n.name] = value = super().run_node(n)
            return value

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            """A view may be of what lies otherwise than tracing took it to: values count here."""
            return super().call_function(aten.reshape.default if target in RESHAPES else target, args, kwargs)

    with torch.no_grad():
        return Recorder(program.global_gm, garbage_collect_values=False).run(*[x.detach() for x in flat])


class Way(NamedTuple):
    """What lies on the way to a value: the largest element, and the coarsest dtype that rounded."""

    largest: float = 0.0
    dtype: torch.dtype = torch.float64


def _ways(program: Lowered, reference: dict[str, Any]) -> dict[str, Way]:
    """The way to each value of the graph at global shapes."""
    out: dict[str, Way] = {}
    for node in program.global_gm.graph.nodes:
        values = tensors_in(reference.get(node.name)) if node.op != "output" and not _unwritten(node) else []
        real = [t for t in values if t.is_floating_point() or t.is_complex()]
        behind = [out[n.name] for n in node.all_input_nodes]
        dtypes = [*(t.dtype.to_real() for t in real), *(w.dtype for w in behind)]
        largest = max([*map(_largest, values), *(w.largest for w in behind)], default=0.0)
        out[node.name] = Way(largest, max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float64))
    return out


def _unwritten(node: Node) -> bool:
    """Whether a value is memory that nobody has written yet, if only a piece or another layout of it."""
    while (move := move_of(node)) is not None:
        node = move.args[0]
    return "empty" in target_name(node.target)


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()] if x.is_floating_point() or x.is_complex() else x.new_zeros(0)
    return finite.abs().max().item() if finite.numel() else 0.0


def _allowed(want: Tensor, way: Way) -> float:
    """How far from `want` a value may be; nothing for integers."""
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0
    real = max(want.dtype.to_real(), way.dtype, key=lambda d: torch.finfo(d).eps)
    return TOLERANCE[real] * _largest(want) + ROUNDINGS * torch.finfo(real).eps * way.largest


def _compare_ends(
    program: Lowered, ends: Sequence[Any], outputs: list, gradients: dict[int, Any], ways: dict[str, Way]
) -> None:
    """The traced graph against the original module."""
    ends_of = returned(program.global_gm)
    entries = program.signature.outputs
    expected = [outputs[i] if i < len(outputs) else gradients.get(i) for i in range(len(entries))]
    for entry, node, have, want in zip(entries, ends_of, ends, expected, strict=True):
        if entry.kind is OutputKind.MUTATION or not isinstance(want, Tensor) or not isinstance(node, Node):
            continue
        difference = _difference(have, want)
        if difference > _allowed(want, ways[node.name]):
            what = f"{entry.kind.value} {entry.name or ''}".strip()
            raise ShardingError(
                f"%{node.name}, {what}, differs from the original module by {difference:.1e}",
                where=of(node).where,
                help="the traced program does not compute what the module does",
            )


def _nothing_kept(program: Lowered) -> list[Tensor]:
    """Zeros for the gradients that earlier steps may have kept back."""
    kept = [val(node) for _, node in inputs_of(program.gm, program.signature, InputKind.CARRY)]
    return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in kept]


def _compare_ranks(program: Lowered, flat: list[Tensor], reference: dict[str, Any], ways: dict[str, Way]) -> float:
    """All ranks, simulated, against the graph at global shapes; value by value, in program order."""
    mesh, worst = program.mesh, 0.0
    coords = [mesh.coords(r) for r in range(mesh.size)]
    inputs = [
        [cut(x.detach(), specs(n)[0], mesh, at) for at in coords]
        for x, n in zip(flat, placeholders(program.gm), strict=True)
    ]
    origin: dict[str, str] = {}
    unwritten = {n.name for n in program.global_gm.graph.nodes if _unwritten(n)}

    def watch(node: Node, pieces: list[Any]) -> None:
        nonlocal worst
        name = origin[node.name] = _origin(node, origin, reference)
        if of(node).by_origin:  # all ranks' rows are those of one device, in another order
            origin[node.name] = ""
            return
        if name not in reference or node.op != "call_function" or name in unwritten:
            return
        values = tensors_in(reference[name])
        for i, (want, layout) in enumerate(zip(values, specs(node), strict=False)):
            have = [tensors_in(p)[i] for p in pieces]
            worst = max(worst, _check(node, have, want, layout, program, ways[name]))

    try:
        with torch.no_grad():
            found = simulate(program.gm, mesh, inputs, watch)
    except (RuntimeError, IndexError, TypeError) as error:
        last = next((n for n in program.gm.graph.nodes if n.op == "call_function" and n.name not in origin), None)
        raise ShardingError(
            f"%{last.name if last else '?'} does not run on every rank: {error}",
            where=of(last).where if last else "",
            excerpt=excerpt(last) if last else "",
        ) from error
    _compare_returned(program, found, reference, ways)
    return worst


def _compare_returned(program: Lowered, found: list[Any], reference: dict[str, Any], ways: dict[str, Way]) -> None:
    """What leaves the program is laid out as it was decided, whatever the last steps are now."""
    for want, have, pieces in zip(returned(program.global_gm), returned(program.gm), found, strict=True):
        if isinstance(want, Node) and isinstance(have, Node):
            layout, name = specs(want)[0], f"%{want.name}, as it is returned,"
            _check(have, pieces, reference[want.name], layout, program, ways[want.name], name)


def _origin(node: Node, origin: dict[str, str], reference: dict[str, Any]) -> str:
    """Which value of the global graph a node holds: its own name's, or for a collective its operand's."""
    if of(node).origin:
        return of(node).origin
    if node.name in reference or not node.all_input_nodes:
        return node.name
    if node.target in c.SYMBOLIC:
        return origin.get(node.all_input_nodes[0].name, "")
    return ""


def _check(
    node: Node, pieces: list[Tensor], want: Tensor, layout: Spec, program: Lowered, way: Way, name: str = ""
) -> float:
    """The largest difference on any rank, as a part of the largest value on the way."""
    mesh, name = program.mesh, name or f"%{node.name}"
    coords = [mesh.coords(r) for r in range(mesh.size)]
    shapes = [tuple(want.shape) if layout.of_data else layout.local_shape(mesh, at) for at in coords]
    wrong = next((r for r, (p, s) in enumerate(zip(pieces, shapes, strict=True)) if tuple(p.shape) != s), None)
    if wrong is not None:
        raise _differs(node, f"{name} has shape {tuple(pieces[wrong].shape)} on rank {wrong}, not {shapes[wrong]}")
    if layout.pending:
        worst = _difference(join(pieces, layout, mesh), want)
    else:
        worst = max(_difference(p, cut(want, layout, mesh, mesh.coords(r))) for r, p in enumerate(pieces))
    travelled = want.to(of(node).wire or want.dtype)
    if worst > _allowed(travelled, way):
        largest = f"its largest value being {_largest(want):.1e}"
        raise _differs(node, f"{name} differs from one device by {worst:.1e}, {largest}")
    return worst / max(way.largest, 1e-30)


def _differs(node: Node, what: str) -> ShardingError:
    return ShardingError(what, where=of(node).where, excerpt=excerpt(node))


def _difference(have: Tensor, want: Tensor) -> float:
    """The largest difference between elements; equal infinities and NaNs do not differ."""
    if have.shape != want.shape:
        return float("inf")
    if not want.numel() or torch.equal(have, want):
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return float("inf")
    same = (have == want) | (have.isnan() & want.isnan())
    worst = torch.where(same, 0.0, have - want).abs().max().item()
    return worst if worst == worst else float("inf")
