"""Runs one operator call on every rank of a mesh at once, on real tensors, honouring shape_arg and localize."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardc.compiler.infer import Decision
from shardc.compiler.mesh import Mesh
from shardc.compiler.rules.table import OpRule
from shardc.compiler.spec import axes_of, chunk
from tests.rules.pieces import COMBINE, indices


class Exchange:
    """Where the ranks' threads meet: each leaves a tensor and takes the whole round's."""

    def __init__(self, ranks: int) -> None:
        self.slots: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=20)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        out = list(self.slots)
        self.barrier.wait()
        return out


@dataclass
class EagerSite:
    """A rules.site.Site on the real tensors of one rank."""

    args: Any
    kwargs: Any
    rule: OpRule
    decision: Decision
    mesh: Mesh
    rank: int
    exchange: Exchange
    coords: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.coords = self.mesh.coords(self.rank)

    def split(self, factor: str) -> bool:
        return bool(axes_of(self.decision.factor(factor)))

    def size(self, factor: str) -> int:
        return len(indices(self.decision.factor(factor), self.mesh, self.coords))

    def start(self, factor: str) -> int:
        dim = self.decision.factor(factor)
        if len(dim) != 1 or factor not in self.rule.plain:
            raise ValueError(f"{factor} need not be one run of indices: the rule does not call it plain")
        return chunk(dim[0].size, self.mesh, dim[0].axes, self.coords)[0]

    def full(self, factor: str) -> int:
        return self.rule.size(factor)

    def may_be_empty(self, factor: str) -> bool:
        dim = self.decision.factor(factor)
        return any(not indices(dim, self.mesh, self.mesh.coords(r)) for r in range(self.mesh.size))

    def result_shape(self, i: int = 0) -> list[int]:
        return list(self.decision.results[i].local_shape(self.mesh, self.coords))

    def operand_shape(self, i: int = 0) -> list[int]:
        return list(self.decision.operands[i].local_shape(self.mesh, self.coords))

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    def all_reduce(self, x: torch.Tensor, factor: str, op: str = "sum") -> torch.Tensor:
        axes = axes_of(self.decision.factor(factor))
        kept = {a: c for a, c in self.coords.items() if a not in axes}
        every = self.exchange.swap(self.rank, x)
        mine = [t for r, t in enumerate(every) if kept.items() <= self.mesh.coords(r).items()]
        return functools.reduce(COMBINE[op], mine)


def run_ranks(
    op: Any, rule: OpRule, decision: Decision, mesh: Mesh, calls: Sequence[tuple[Any, Any]]
) -> list[Any]:
    """Every rank's result of the call, given every rank's local (args, kwargs)."""
    if rule.localize is None:
        return [_plain_call(op, rule, decision, mesh, r, *call) for r, call in enumerate(calls)]
    exchange = Exchange(mesh.size)
    sites = [EagerSite(a, k, rule, decision, mesh, r, exchange) for r, (a, k) in enumerate(calls)]
    return _together([functools.partial(rule.localize, site) for site in sites], exchange)


def _plain_call(op: Any, rule: OpRule, decision: Decision, mesh: Mesh, rank: int, args: Any, kwargs: Any) -> Any:
    if rule.shape_arg is not None:
        shape = list(decision.results[0].local_shape(mesh, mesh.coords(rank)))
        args = (*args[: rule.shape_arg], shape, *args[rule.shape_arg + 1 :])
    return op(*args, **kwargs)


def _together(calls: Sequence[Callable[[], Any]], exchange: Exchange) -> list[Any]:
    """The calls run as threads that may meet in the exchange; the first error of any is raised."""
    out: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            out[i] = calls[i]()
        except threading.BrokenBarrierError:
            pass
        except Exception as e:
            errors.append(e)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    if exchange.barrier.broken:
        raise RuntimeError("the ranks do not make the same collectives")
    return out


