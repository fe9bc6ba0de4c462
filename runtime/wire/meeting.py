"""Before ranks move anything for a half of a program, they tell each other which half it is, and of which call.

A rank that calls forward once more, leaves a backward out, or uses two models in another order would else put its
values into another collective than the others: wrong numbers, or the end of the process where sizes differ. So each
half says so with its first message over a mesh dim. Where that is large, a small one goes before it, under way while
the half begins to compute. Nothing else moves there before all have said the same. On gloo alone: elsewhere the host
would have to wait for the device.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

HEAD = 48  # bytes: six numbers
CARRIED = 4 << 20  # bytes from all others that travel behind them at most; before more than that they go alone
SAMPLE = 64  # elements of an input that are compared
CLOSE = 1e-3  # of the sum of sizes: what ranks computed by themselves may differ by rounding


class Sums(NamedTuple):
    """Of inputs that ranks share: a checksum of whole numbers, the sum of others, and that of their sizes."""

    exact: int = 0
    total: float = 0.0
    size: float = 0.0

    @classmethod
    def of(cls, inputs: Sequence[Tensor]) -> Sums:
        """By a sample of each; not of what lies on another device, for which the host would have to wait."""
        exact, total, size = 0, 0.0, 0.0
        for x in inputs:
            if not x.is_cpu:
                continue
            flat = x.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // SAMPLE)]
            if x.is_floating_point():
                some = some.double()
                total, size = total + some.sum().item(), size + some.abs().sum().item()
            elif not x.is_complex():
                exact = zlib.crc32(some.contiguous().numpy().tobytes(), exact)
        return cls(exact, total, size)

    def like(self, other: Sums) -> bool:
        apart = abs(self.total - other.total) > CLOSE * max(self.size, other.size)  # not so of what is no number
        return self.exact == other.exact and not apart


class About(NamedTuple):
    """What a rank is about to do. epoch: how often all ranks gave a call up together; number: of the call since then;
    what: a digest of the half."""

    epoch: int
    number: int
    what: int
    given: Sums = Sums()

    def like(self, other: About) -> bool:
        return self[:3] == other[:3] and self.given.like(other.given)

    def row(self) -> list[int]:
        """As whole numbers of 64 bits."""
        return [self.epoch, self.number, self.what, self.given.exact, *map(_bits, self.given[1:])]

    @classmethod
    def read(cls, row: Sequence[int]) -> About:
        epoch, number, what, exact, total, size = row
        return cls(epoch, number, what, Sums(exact, _float(total), _float(size)))


def _bits(x: float) -> int:
    return struct.unpack("q", struct.pack("d", x))[0]


def _float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]


def carried(size: int) -> int:
    """Bytes for one rank that may travel behind what a rank says, among so many ranks."""
    return CARRIED // (size - 1) // 8 * 8


class Carried:
    """A message that begins with what a rank is about to do. Rows that come in have room for any such message, as
    those of ranks that are out of step are of another size: gloo would end a process that has less."""

    def __init__(self, group: Any, about: About, out: Tensor, sizes: list[int], room: list[int]) -> None:
        self.about, self._group, self._out, self._sizes, self._room = about, group, out, sizes, room
        self._into: list[Tensor] = []  # where what follows belongs, by rank
        self.send()

    def send(self) -> None:
        self.come = self._out.new_empty(sum(self._room))
        splits = self._room, self._sizes
        self.work = dist.all_to_all_single(self.come, self._out, *splits, group=self._group, async_op=True)

    def into(self, pieces: list[Tensor]) -> Carried:
        self._into = pieces
        return self

    def said(self) -> list[About]:
        """What each rank said, this one's own among it; what came with it is put where it belongs."""
        rows = self.come.split(self._room)
        said = [About.read(row[:HEAD].view(torch.int64).tolist()) if len(row) else self.about for row in rows]
        for piece, row in zip(self._into, rows, strict=False):
            if len(row):
                piece.copy_(row[HEAD : HEAD + len(piece)])
        return said


def sent_alone(group: Any, size: int, index: int, about: About) -> Carried:
    """A message of nothing else."""
    return _sent(group, size, index, about, [torch.empty(0, dtype=torch.uint8)] * size)


def carrying(group: Any, size: int, index: int, about: About, op: Any, got: Tensor, sent: Tensor, *splits: Any) -> Any:
    """With a collective of bytes, which this takes the place of."""
    gathers = op is dist.all_gather_single
    receive, send = ([len(sent)] * size,) * 2 if gathers else splits
    pieces = [sent] * size if gathers else list(sent.split(send))
    into = list(got.split(receive))
    into[index].copy_(pieces[index])
    return _sent(group, size, index, about, pieces).into(into)


def _sent(group: Any, size: int, index: int, about: About, pieces: list[Tensor]) -> Carried:
    head = torch.tensor(about.row()).view(torch.uint8)
    others = [r for r in range(size) if r != index]
    out = torch.cat([x for r in others for x in (head, pieces[r])])
    sizes = [0 if r == index else HEAD + len(piece) for r, piece in enumerate(pieces)]
    return Carried(group, about, out, sizes, [0 if r == index else HEAD + carried(size) for r in range(size)])


@dataclass
class Door:
    """Where the ranks along one mesh dim meet."""

    to_say: About | None = None  # with the next message
    under_way: Carried | None = None
    issued: int = 0  # how many collectives moved here since the half began
    stale: list[Any] = field(default_factory=list)  # messages of calls that were given up: the others' next fits them

    def settle(self, finish: Callable[[Any, Tensor], None]) -> list[About]:
        """What each rank said, where they do not say the same. finish: waits for a message, and looks where the others
        are while it does."""
        while self.under_way is not None:
            message = self.under_way
            finish(message.work, message.come)
            said = message.said()
            if any(other.epoch < message.about.epoch for other in said):  # of a call that was given up since
                message.send()
                continue
            self.under_way = None
            if not all(other.like(message.about) for other in said):
                return said
        return []

    def give_up(self) -> bool:
        """Whether nothing else was under way here than the message by which a call begins."""
        self.to_say, before = None, self.to_say
        self.stale += [self.under_way] * (self.under_way is not None)
        self.under_way, sent = None, self.under_way
        return before is not None or (sent is not None and self.issued <= 1)
