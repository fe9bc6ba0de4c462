"""How the ranks carry out a collective, and the memory that takes on each: stated here, done by the runtime's wire.

What is sent is the operand as it lies, where it is one value in one stretch of memory whose pieces follow one another;
else it is laid out anew. A backend is gloo, nccl or another's name; empty is one that has no ways of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.collectives import Cut, cut_of
from shardc.compiler.ir.moves import Call
from shardc.compiler.spec.mesh import Mesh

# bytes: up to here an all-reduce gathers all summands in one round; beyond, two rounds are faster (gloo, measured)
SMALL = 1 << 20
SUMMED = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)


class Route(NamedTuple):
    """received: bytes that others, or a backend, fill. shows: the memory that the result lies in, "sent" or
    "received"; else it is new. extra: bytes that finishing takes besides."""

    how: str
    received: int
    shows: str = ""
    extra: int = 0


def swaps(n: int, backend: str) -> bool:
    """Whether two ranks swap what they have: on gloo that takes half the time of any other collective."""
    return n == 2 and backend == "gloo"


def reduced(nbytes: int, n: int, op: str, dtype: torch.dtype, backend: str, owned: bool) -> Route:
    """An all_reduce. owned: what is sent is laid out anew, or dead behind it, and may hold the result."""
    if swaps(n, backend) and nbytes <= SMALL:
        return Route("swap", nbytes, "sent" if owned and op == "sum" else "")
    if op == "sum" and dtype in SUMMED and (n == 2 or backend == "nccl"):
        return Route("backend", 0, "sent") if owned else Route("backend", nbytes, "received")
    if nbytes * n <= SMALL:
        return Route("gather", nbytes * n, extra=nbytes * (n > 2))  # the sum before the last one
    piece = -(-nbytes // n)
    return Route("two rounds", piece if swaps(n, backend) else nbytes, extra=piece)


def gathered(rows: Sequence[int], itemsize: int, shows: bool) -> Route:
    """An all_gather, in rows of the longest. shows: whether these are the whole as it is."""
    return Route("gather", len(rows) * max(rows) * itemsize, "received" if shows else "")


def scattered(rows: Sequence[int], several: bool, index: int, op: str, dtype: torch.dtype, backend: str) -> Route:
    """A reduce_scatter, on the rank of this index. several: whether a row is taken apart."""
    n, mine = len(rows), rows[index] * dtype.itemsize
    if op == "sum" and dtype in SUMMED and backend == "nccl":
        return Route("backend", max(rows) * dtype.itemsize, "" if several else "received")
    if swaps(n, backend):
        return Route("swap", mine, extra=mine * several)
    return Route("exchange", n * mine, extra=mine * (several + (n > 2)))


def route_of(move: Call, cuts: Sequence[Cut], nbytes: int, n: int, dtype: torch.dtype, owned: bool) -> Route:
    """Of a collective but fetch, on the first rank, over a backend that has no ways of its own. nbytes: of what is
    sent, dealt by `cuts`; owned: as in `reduced`."""
    rows, several = joint_rows(cuts), not isinstance(move.args[0], Node)
    op = (*(a for a in move.args[1:] if isinstance(a, str)), "sum")[1]
    if move.target is c.all_reduce:
        return reduced(nbytes, n, op, dtype, "", owned)
    if move.target is c.all_gather:
        return gathered(rows, dtype.itemsize, not several and cuts[0].leading and cuts[0].gapless)
    if move.target is c.reduce_scatter:
        return scattered(rows, several, 0, op, dtype, "")
    return Route("exchange", nbytes)


def cuts_of(move: Call, mesh: Mesh, coords: Mapping[str, int]) -> list[Cut]:
    """How each value that a collective but all_reduce and fetch moves is dealt into pieces."""
    found = []
    for part in move.each():
        dim = part.args[2] if part.target is c.all_to_all else part.args[1]
        split = part.before if part.target is c.all_gather else part.after
        found.append(cut_of(split, dim, part.axis, mesh, coords, part.before))
    return found


def joint_rows(cuts: Sequence[Cut]) -> list[int]:
    """Elements that move to or from each rank, of all values together."""
    return [sum(numels) for numels in zip(*(cut.numels for cut in cuts), strict=True)]
