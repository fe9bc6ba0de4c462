"""What is known of rows that lie by origin: their order, what points into them, and which numbers count groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from shardc.compiler.ir.node import arguments, target_name, val
from shardc.compiler.rules.facts import RESHAPES
from shardc.compiler.rules.site import Site
from shardc.compiler.spec.spec import Dim

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default)
EXACT = (torch.int64, torch.int32, torch.float64, torch.float32)  # hold the numbers of groups and places as they are


class Open(Exception):
    """Rows by origin reach a call that may need them in the order of one device."""

    def __init__(self, orders: Iterable[Order]) -> None:
        self.orders = set(orders)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of each rank's rows that one sort made. dim: how the sorted numbers were split."""

    dim: Dim
    source: Node


@dataclass(frozen=True)
class Rows:
    """What is known of a value beside its layout.

    order: that of the rows along dim `at`; None where they lie as one device has them. into: what entries point to,
    as places among a rank's own rows: of a plainly split dim, or in an order. onto: to each of these once. key: the
    numbers of groups from 0 on, lowest first. counts, ends: a pending sum of how many rows of each group an order has,
    or of where the groups end, a rank's own summand of which is that of its own rows.
    """

    order: Order | None = None
    at: int = 0
    into: Dim | Order | None = None
    onto: bool = False
    key: bool = False
    counts: Order | None = None
    ends: Order | None = None

    @property
    def orders(self) -> set[Order]:
        return {o for o in (self.order, self.into) if isinstance(o, Order)}

    @property
    def loose(self) -> bool:
        """Whether it means something only on its own rank."""
        return self.order is not None or self.into is not None


PLAIN = Rows()


def pointed(into: Dim | Order) -> Dim:
    return into.dim if isinstance(into, Order) else into


def descends(node: Node) -> bool:
    at = 2 if node.target is aten.sort.default else 3
    return bool(node.kwargs.get("descending", (*arguments(node), *[False] * 4)[at]))


def counts_from_zero(ids: Node) -> bool:
    """Whether numbers are places, which are never negative."""
    while ids.op == "call_function" and ids.target in (*RESHAPES, *COPIES):
        ids = arguments(ids)[0]
    source = arguments(ids)[0] if target_name(ids.target) == "getitem" else ids
    return (
        isinstance(source, Node)
        and source.target in (aten.topk.default, aten.argmax.default)
        and (not val(ids).dtype.is_floating_point)
    )


def copies(node: Node) -> bool:
    """Whether numbers of groups and places come out as they are."""
    return node.target in COPIES and val(node).dtype in EXACT


def words(first: str, tail: Sequence[str]) -> str:
    """The dims of a tensor, in a rule's notation."""
    return " ".join([first, *tail])


def own_arange(site: Site) -> Any:
    """0, 1, ... up to a rank's own rows."""
    return site.call(aten.arange.default, site.size("n"), **site.kwargs)
