"""The two ways to run a program's halves: all ranks simulated in this process, or this rank for real."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.halves import Halves
from shardc.compiler.ir.node import of, spec, val
from shardc.compiler.ir.signature import InputKind, OutputKind, Signature
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.runtime.run.backward_half import BackwardHalf
from shardc.runtime.run.consuming import boxed
from shardc.runtime.run.error_lines import blaming_line
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import cut, join


class SimulatedRanks:
    """Global tensors in, global tensors out; every rank's piece is computed here.

    There is one loss here, and not one a rank: what the program divides to average their gradients is multiplied at
    the door. copied: inputs that are overwritten once forward has run, and needed in backward.
    """

    def __init__(self, parts: Halves, signature: Signature, mesh: Mesh, copied: Collection[int]) -> None:
        self._forward, self._mesh, self._copied = parts.forward, mesh, copied
        self._results = len(signature.indices(OutputKind.OUTPUT, OutputKind.MUTATION))
        late = len(signature.indices(InputKind.TANGENT, InputKind.CARRY))
        self._backward = parts.backward and BackwardHalf(parts.backward, late, self._ready, self._nothing)
        given = placeholders(parts.forward)
        self._ways = [of(given[signature.outputs[i].of or 0]).divided for i in signature.indices(OutputKind.GRADIENT)]
        self._coords = [mesh.coords(r) for r in range(mesh.size)]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        with torch.no_grad():
            given = [x.clone() if i in self._copied else x for i, x in enumerate(inputs)]
            pieces = [self._cut(x, spec(n)) for x, n in zip(given, placeholders(self._forward), strict=True)]
            found = simulate(self._forward, self._mesh, pieces)
        whole = self._joined(self._forward, found[: self._results])
        return whole, [v for p in found[self._results :] for v in p]

    def backward(self, saved: list[Any], tangents: Sequence[Any], carries: Sequence[Any]) -> list[Any]:
        assert self._backward is not None and not carries
        n = self._mesh.size
        kept = [list(saved[i : i + n]) for i in range(0, len(saved), n)]
        with torch.no_grad():
            pairs = zip(tangents, self._backward.given, strict=True)
            dealt = [t if t is None else self._cut(_times(t, of(x).divided), spec(x)) for t, x in pairs]
            whole = self._backward(kept, dealt)
            return [_times(g, by) for g, by in zip(whole, self._ways, strict=True)]

    def _ready(self, gm: GraphModule) -> Callable[[list[Any]], list[Any]]:
        return lambda pieces: self._joined(gm, simulate(gm, self._mesh, pieces))

    def _nothing(self, node: Node) -> list[Tensor]:
        return self._cut(torch.zeros(spec(node).shape, dtype=val(node).dtype, device=val(node).device), spec(node))

    def _cut(self, x: Tensor, layout: Spec) -> list[Tensor]:
        pieces = [cut(x.detach(), layout, self._mesh, at) for at in self._coords]
        return pieces if layout.is_whole else [piece.contiguous() for piece in pieces]  # as a rank has them

    def _joined(self, gm: GraphModule, found: Sequence[list[Any]]) -> list[Any]:
        """What a graph returns, of what it returns on every rank."""
        return [
            join(pieces, spec(node), self._mesh) if isinstance(node, Node) and not spec(node).of_data else pieces[0]
            for node, pieces in zip(returned(gm), found, strict=False)
        ]


class ThisRank:
    """Local tensors in, local tensors out: the bound halves of one rank.

    results: how many of forward's returns are the caller's. wrap: what labels which gradients as DTensors.
    early, late: what goes around forward, and backward, given its inputs.
    """

    def __init__(
        self,
        forward: GraphModule,
        backward: BackwardHalf | None,
        results: int,
        wrap: Mapping[int, Any],
        early: Callable[[Sequence[Any]], AbstractContextManager[None]] = nullcontext,
        late: Callable[[Sequence[Any]], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._forward, self._backward, self._results, self._wrap = forward, backward, results, wrap
        self._early, self._late = early, late

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        with torch.no_grad(), self._early(inputs), blaming_line(self._forward):
            found = list(self._forward.forward(*[_local(x) for x in inputs]))
        return found[: self._results], found[self._results :]

    def backward(self, saved: list[Any], tangents: Sequence[Any], carries: Sequence[Any]) -> list[Any]:
        assert self._backward is not None
        with torch.no_grad():
            with self._late(tangents):
                found = self._backward(saved, [*tangents, *carries])
            return [self._wrap[i](g) if i in self._wrap and g is not None else g for i, g in enumerate(found)]


def ready(gm: GraphModule) -> Callable[[list[Any]], Any]:
    """A bound half as a function that uses its arguments up."""
    taking = boxed(gm)

    def run(values: list[Any]) -> Any:
        with blaming_line(taking):
            return list(taking.forward(values))

    return run


def _times(x: Any, by: int) -> Any:
    return x if by == 1 or x is None else x * by


def _local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, without a dispatch."""
    return getattr(x, "_local_tensor", x)
