"""The two ways to run a program's halves: all ranks simulated in this process, or this rank for real."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.node import of, spec
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.runtime.run.consuming import boxed
from shardc.runtime.run.error_lines import blaming_line
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import cut, join


class SimulatedRanks:
    """Global tensors in, global tensors out; every rank's piece is computed here.

    results: how many of forward's returns are the caller's. sources: which inputs the gradients belong to. There is
    one loss here, and not one a rank: what the program divides to average their gradients is multiplied at the door.
    copied: inputs that are overwritten once forward has run, and needed in backward.
    """

    def __init__(
        self,
        forward: GraphModule,
        backward: GraphModule | None,
        mesh: Mesh,
        results: int,
        sources: Sequence[int],
        copied: Collection[int],
    ) -> None:
        self._copied = copied
        self._forward, self._backward, self._mesh, self._results = forward, backward, mesh, results
        given = placeholders(forward)
        self._ways = [of(given[i]).divided for i in sources]
        self._coords = [mesh.coords(r) for r in range(mesh.size)]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        with torch.no_grad():
            given = [x.clone() if i in self._copied else x for i, x in enumerate(inputs)]
            pieces = [self._cut(x, spec(n)) for x, n in zip(given, placeholders(self._forward), strict=True)]
            found = self._run(self._forward, pieces)
        ends = returned(self._forward)[: self._results]
        whole = [self._join(p, n) for p, n in zip(found, ends, strict=False)]
        return whole, [v for p in found[self._results :] for v in p]

    def backward(self, saved: list[Any], tangents: Sequence[Tensor], carries: Sequence[Any]) -> list[Any]:
        assert self._backward is not None and not carries
        nodes = placeholders(self._backward)
        n = self._mesh.size
        kept = [list(saved[i : i + n]) for i in range(0, len(saved), n)]
        with torch.no_grad():
            pairs = zip(tangents, nodes[len(kept) :], strict=True)
            dealt = [self._cut(_times(t, of(x).divided), spec(x)) for t, x in pairs]
            found = self._run(self._backward, [*kept, *dealt])
            whole = [self._join(p, x) for p, x in zip(found, returned(self._backward), strict=True)]
            return [_times(g, by) for g, by in zip(whole, self._ways, strict=True)]

    def _run(self, gm: GraphModule, inputs: Sequence[list[Any]]) -> list[list[Any]]:
        return simulate(gm, self._mesh, inputs)

    def _cut(self, x: Tensor, layout: Spec) -> list[Tensor]:
        return [cut(x.detach(), layout, self._mesh, at) for at in self._coords]

    def _join(self, pieces: Sequence[Any], node: Any) -> Any:
        if not isinstance(node, Node) or spec(node).of_data:
            return pieces[0]
        return join(pieces, spec(node), self._mesh)


class ThisRank:
    """Local tensors in, local tensors out: the bound halves of one rank.

    results: how many of forward's returns are the caller's. wrap: what labels which gradients as DTensors.
    blank: makes the zeros that stand for each carry already consumed. early, late: the generator that forward, and
    backward, draws from.
    """

    def __init__(
        self,
        forward: GraphModule,
        backward: GraphModule | None,
        results: int,
        wrap: Mapping[int, Any],
        blank: Sequence[Any],
        early: Callable[[], AbstractContextManager[None]] = nullcontext,
        late: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._forward, self._backward = forward, backward and boxed(backward)
        self._results, self._wrap = results, wrap
        self._blank, self._early, self._late = blank, early, late

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        with torch.no_grad(), self._early(), blaming_line(self._forward):
            found = list(self._forward.forward(*[_local(x) for x in inputs]))
        return found[: self._results], found[self._results :]

    def backward(self, saved: list[Any], tangents: Sequence[Tensor], carries: Sequence[Any]) -> list[Any]:
        assert self._backward is not None
        values = [*saved, *tangents]
        saved.clear()
        values += [make() if c is None else c for c, make in zip(carries, self._blank, strict=True)]
        with torch.no_grad():
            with self._late(), blaming_line(self._backward):
                found = self._backward.forward(values)
            return [self._wrap[i](g) if i in self._wrap and g is not None else g for i, g in enumerate(found)]


def _times(x: Any, by: int) -> Any:
    return x if by == 1 or x is None else x * by


def _local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, without a dispatch."""
    return getattr(x, "_local_tensor", x)
