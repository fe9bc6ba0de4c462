"""Runs one operator call on every rank of a mesh, on real tensors, honouring shape_arg and localize."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardc.compiler.infer.infer import Decision
from shardc.compiler.rules.site import Wanted
from shardc.compiler.rules.table import OpRule
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import axes_of, chunk
from tests.rules.pieces import COMBINE, indices


class NeedsOthersError(Exception):
    """A rank that runs by itself came to a collective."""


class Exchange:
    """Where the ranks' threads meet: each leaves a tensor and takes the whole round's."""

    def __init__(self, ranks: int) -> None:
        self.rounds: list[dict[int, Any]] = []
        self.made = [0] * ranks
        self.gone: set[int] = set()
        self.news = threading.Condition()

    def swap(self, rank: int, value: Any) -> list[Any]:
        with self.news:
            i, everyone = self.made[rank], set(range(len(self.made)))
            self.made[rank] += 1
            self.rounds += [{}] if i == len(self.rounds) else []
            self.rounds[i][rank] = value
            self.news.notify_all()
            self.news.wait_for(lambda: everyone <= self.rounds[i].keys() | self.gone)
            if everyone - self.rounds[i].keys():
                raise RuntimeError("the ranks do not make the same collectives")
            return [self.rounds[i][r] for r in sorted(everyone)]

    def leave(self, rank: int) -> None:
        """This rank makes no more collectives."""
        with self.news:
            self.gone.add(rank)
            self.news.notify_all()


@dataclass
class EagerSite:
    """A rules.site.Site on the real tensors of one rank."""

    args: Any
    kwargs: Any
    rule: OpRule
    decision: Decision
    mesh: Mesh
    rank: int
    exchange: Exchange | None = None
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

    def stop(self, factor: str) -> int:
        return self.start(factor) + self.size(factor)

    def runs(self, factor: str) -> list[tuple[int, int, int]]:
        dim = self.decision.factor(factor)
        return [(part.size, *chunk(part.size, self.mesh, part.axes, self.coords)) for part in dim]

    def full(self, factor: str) -> int:
        return self.rule.size(factor)

    def place(self, factor: str) -> int:
        self.start(factor)
        axes = axes_of(self.decision.factor(factor))
        orders = itertools.product(*(range(self.mesh[a]) for a in axes))
        return list(orders).index(tuple(self.coords[a] for a in axes))

    def ways(self, factor: str) -> int:
        return math.prod(self.mesh[a] for a in axes_of(self.decision.factor(factor)))

    def least(self, factor: str) -> int:
        dim = self.decision.factor(factor)
        return min(len(indices(dim, self.mesh, self.mesh.coords(r))) for r in range(self.mesh.size))

    def may_be_empty(self, factor: str) -> bool:
        return self.least(factor) == 0

    def result_shape(self, i: int = 0) -> list[int]:
        return list(self.decision.results[i].local_shape(self.mesh, self.coords))

    def operand_shape(self, i: int = 0) -> list[int]:
        return list(self.decision.operands[i].local_shape(self.mesh, self.coords))

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    def of_first_rank(self, x: torch.Tensor) -> torch.Tensor:
        if self.exchange is None:
            raise NeedsOthersError
        return self.exchange.swap(self.rank, x)[0]

    def fetch(
        self, x: torch.Tensor, dim: int, factor: str, wanted: Wanted, of: str = "", fill: float | None = None
    ) -> torch.Tensor:
        if self.exchange is None:
            raise NeedsOthersError
        (axis,) = axes_of(self.decision.factor(factor))
        if factor not in self.rule.lone:
            raise ValueError(f"{factor} need not be split by one mesh dim: the rule does not call it lone")
        kept = {a: c for a, c in self.coords.items() if a != axis}
        every = self.exchange.swap(self.rank, x)
        whole = torch.cat([t for r, t in enumerate(every) if kept.items() <= self.mesh.coords(r).items()], dim)
        (part,) = self.decision.factor(of or factor)
        aim = chunk(part.size, self.mesh, part.axes, self.coords)
        rows = []
        for i in (i for run in wanted(*aim) for i in run):
            inside = 0 <= i < whole.shape[dim]
            if not inside and fill is None:
                raise ValueError(f"there is no index {i}, and nothing to fill in")
            rows.append(whole.select(dim, i) if inside else torch.full_like(whole.sum(dim), fill, dtype=x.dtype))
        return torch.stack(rows, dim) if rows else whole.narrow(dim, 0, 0)

    def all_reduce(self, x: torch.Tensor, factor: str, op: str = "sum") -> torch.Tensor:
        if self.exchange is None:
            raise NeedsOthersError
        axes = axes_of(self.decision.factor(factor))
        kept = {a: c for a, c in self.coords.items() if a not in axes}
        every = self.exchange.swap(self.rank, x)
        mine = [t for r, t in enumerate(every) if kept.items() <= self.mesh.coords(r).items()]
        return functools.reduce(COMBINE[op], mine)


def run_ranks(op: Any, rule: OpRule, decision: Decision, mesh: Mesh, calls: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Every rank's result of the call, given every rank's local (args, kwargs)."""
    if rule.localize is None:
        return [_plain_call(op, rule, decision, mesh, r, *call) for r, call in enumerate(calls)]
    sites = [EagerSite(a, k, rule, decision, mesh, r) for r, (a, k) in enumerate(calls)]
    try:
        return [rule.localize(site) for site in sites]
    except NeedsOthersError:
        exchange = Exchange(mesh.size)
    for site in sites:
        site.exchange = exchange
    return _together([functools.partial(rule.localize, site) for site in sites], exchange)


def _plain_call(op: Any, rule: OpRule, decision: Decision, mesh: Mesh, rank: int, args: Any, kwargs: Any) -> Any:
    if rule.shape_arg is not None:
        shape = list(decision.results[0].local_shape(mesh, mesh.coords(rank)))
        args = (*args[: rule.shape_arg], shape, *args[rule.shape_arg + 1 :])
    return op(*args, **kwargs)


def _together(calls: Sequence[Callable[[], Any]], exchange: Exchange) -> list[Any]:
    """The calls run as threads that may meet in the exchange. Raises the lowest rank's error."""
    out: list[Any] = [None] * len(calls)
    errors: dict[int, Exception] = {}

    def run(rank: int) -> None:
        try:
            out[rank] = calls[rank]()
        except Exception as error:
            errors[rank] = error
        exchange.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return out
