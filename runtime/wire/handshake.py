"""Ranks compare notes before they depend on each other: through the store, never through a collective.

Each rank posts a digest, all read all digests, and the first to reach a verdict posts it for everyone, so
either every rank goes on or every rank raises the same error: a rank that comes too late finds the verdict
that it is missing. Texts are posted only once digests differ.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from shardc.compiler.errors import RankMismatchError
from shardc.runtime.wire.groups import Groups

TIMEOUT = 300.0  # seconds: ranks compile at different speed, more so with a cold cache on one of them
POST = 4 << 20  # bytes of a posted text, a multiple of 4; the store breaks the connection at 8 MiB
WIDTH = 160  # characters of a line that a message shows
SECOND_WAIT = 30.0  # seconds for the texts: every rank is there, and posts its own at once
END = "(the text ends before this line)"


def agree(
    text: str | Iterable[object],
    groups: Groups | Sequence[int] | None,
    what: str,
    timeout: float = TIMEOUT,
    call: int = 0,
) -> None:
    """Return once all ranks of `groups` have called this with the same text.

    text: what must be equal, or values, which count as one line each. groups: those of a mesh, or global
    ranks; None for all of the process group. what: its name in the message ("the program", "input sizes").
    call: which call of a program this precedes, by the count of `Calls`; 0 where it precedes none.
    Without a process group, or called on a rank that is not among them, it returns at once.
    Raises RankMismatchError on every one of the ranks: naming those that differ, their digests and the first
    line that does; or those that did not come within `timeout` seconds, or that the store is gone.
    """
    if not dist.is_initialized() or dist.get_backend() == "fake":  # its other ranks are not there to ask
        return
    ranks = groups.ranks if isinstance(groups, Groups) else groups
    everyone = tuple(range(dist.get_world_size()) if ranks is None else ranks)
    me = dist.get_rank()
    if me not in everyone or len(everyone) == 1:
        return
    lines = text if isinstance(text, str) else "\n".join(map(str, text))
    try:
        _Round(me, everyone, what, lines, call).hold(timeout)
    except dist.DistError as error:
        raise RankMismatchError(
            f"{what}: the store is gone, with the process that serves it (rank 0 or the launcher): {error}"
        ) from error


class Calls:
    """The calls that some ranks make together, counted by each of them alike.

    A rank whose call needs another program than before compares it with the others, who may be inside a
    collective of that same call, having the program they need: they look here while they wait for it.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks, self.number, self.entered = ranks, 0, 0

    @contextmanager
    def entering(self) -> Iterator[None]:
        """One more call begins: what is compared meanwhile is compared for it."""
        self.number += 1
        self.entered = self.number
        try:
            yield
        finally:
            self.entered = 0

    def look(self) -> None:
        """Raises RankMismatchError where another rank compares programs before the call that this one is in, or before
        one that this one has passed."""
        if not dist.is_initialized() or dist.get_backend() == "fake":
            return
        me, members = dist.get_rank(), _members(self.ranks)
        for other in self.ranks:
            if other == me or not members.check([f"at/{other}"]):
                continue
            number, call = members.get(f"at/{other}").decode().split()
            verdict = f"apart {me} {other}"
            board = PrefixStore(number, members)
            passed = call.isdigit() and int(call) <= self.number  # what all agreed on has its verdict
            if passed and board.compare_set("verdict", "", verdict).decode() == verdict:
                raise RankMismatchError(_apart(me, other))


@cache
def calls_of(ranks: tuple[int, ...]) -> Calls:
    """The one count that all compiled modules on these ranks share."""
    return Calls(ranks)


def _members(ranks: tuple[int, ...]) -> PrefixStore:
    return PrefixStore(f"shardc/agree/{_digest(repr(ranks))}", _store())


def _apart(running: int | str, comparing: int | str) -> str:
    return (
        f"inputs differ between ranks: rank {running} runs the program of its last call, and rank {comparing} was "
        "called with inputs of another size or kind, for which it needs another program, or differs in what it calls "
        "backward on\n"
        "help: give every rank inputs of equal shapes (pad or drop the last batch), or DTensors, which know their "
        "global shape, and a loss of the same results"
    )


class _Round:
    """One comparison among some ranks, as one of them takes part in it.

    Ranks count their rounds in the store, so that the n-th of each meet.
    """

    def __init__(self, me: int, ranks: tuple[int, ...], what: str, text: str, call: int) -> None:
        self.me, self.ranks, self.what, self.text = me, ranks, what, text
        members = _members(ranks)
        number = members.add(f"rounds/{me}", 1)
        self.board = PrefixStore(str(number), members)
        members.set(f"at/{me}", f"{number} {call or 'none'}")

    def hold(self, timeout: float) -> None:
        """Raises RankMismatchError unless all ranks come within the timeout, with equal texts."""
        self.board.set(f"note/{self.me}", f"{_digest(self.text)} {self.what}")
        missing = self._wait_for("note", self.ranks, timeout)
        notes = {} if missing else self._notes()
        found = f"missing {_listed(missing)}" if missing else "same" if _alike(notes) else "differ"
        verdict = self.board.compare_set("verdict", "", found).decode()  # whoever is first speaks for all
        if verdict == "differ":
            raise RankMismatchError(self._difference(self._notes()))
        if verdict.startswith("apart"):
            raise RankMismatchError(_apart(*verdict.split()[1:]))
        if verdict != "same":
            raise RankMismatchError(self._absence(verdict.removeprefix("missing "), timeout))

    def _wait_for(self, kind: str, ranks: Sequence[int], timeout: float) -> list[int]:
        """The ranks whose key of this kind is not there when time is over, or when a verdict is."""
        end, pause = time.monotonic() + timeout, 0.001
        while not self.board.check([f"{kind}/{r}" for r in ranks]):
            if time.monotonic() > end or (kind == "note" and self.board.check(["verdict"])):
                return [r for r in ranks if not self.board.check([f"{kind}/{r}"])]
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
        return []

    def _notes(self) -> dict[int, str]:
        return {r: self.board.get(f"note/{r}").decode() for r in self.ranks}

    def _absence(self, missing: str, timeout: float) -> str:
        many = "s" if "," in missing else ""
        late = " (this rank came after that)" if str(self.me) in missing.split(", ") else ""
        return (
            f"{self.what}: rank{many} {missing} did not come to compare it within {timeout:g} s{late}; it is "
            f"compared by ranks {_listed(self.ranks)}\n"
            f"help: see what rank{many} {missing} did instead: an error, a slow start, another branch"
        )

    def _difference(self, notes: dict[int, str]) -> str:
        camps: dict[str, list[int]] = {}
        for rank, note in notes.items():
            camps.setdefault(note, []).append(rank)
        most, *others = sorted(camps.values(), key=len, reverse=True)  # stable: equal camps stay in rank order
        odd = sorted(r for camp in others for r in camp)
        lines = [f"{self.what} differs between ranks: {_ranks(odd)} against {_ranks(most)}"]
        lines += [f"  {_ranks(camp)}: {notes[camp[0]]}" for camp in (most, *others)]
        lines += self._first_lines([most[0], *(camp[0] for camp in others)])
        lines.append("help: every rank needs the same code, plan, options and input sizes")
        return "\n".join(lines)

    def _first_lines(self, speakers: list[int]) -> list[str]:
        """Where the texts of two camps part. Every rank posts its own, having learnt that they differ."""
        self.board.set(f"text/{self.me}", _packed(self.text))
        first, second = speakers[:2]
        if self._wait_for("text", [first, second], SECOND_WAIT):
            return []
        a, b = (self._text_of(r) for r in (first, second))
        for number, (mine, theirs) in enumerate(itertools.zip_longest(a, b, fillvalue=END), 1):
            if mine != theirs:
                at = len(os.path.commonprefix([mine, theirs]))
                shown = [f"  rank {first}: {_window(mine, at)}", f"  rank {second}: {_window(theirs, at)}"]
                return [f"first difference, line {number}:", *shown]
        return []

    def _text_of(self, rank: int) -> list[str]:
        return _unpacked(self.board.get(f"text/{rank}")).splitlines()


def _store() -> Store:
    group = dist.group.WORLD
    assert group is not None  # the caller has made sure that a process group is initialised
    return group.get_group_store()


def _packed(text: str) -> str:
    return b64encode(zlib.compress(text.encode()))[:POST].decode()


def _unpacked(posted: bytes) -> str:
    """The text, or as much of it as was posted."""
    return zlib.decompressobj().decompress(b64decode(posted)).decode(errors="replace")


def _alike(notes: dict[int, str]) -> bool:
    return len(set(notes.values())) == 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)}"


def _window(line: str, at: int) -> str:
    """The stretch of a long line around a place in it."""
    if len(line) <= WIDTH:
        return line
    start = max(0, min(at - WIDTH // 3, len(line) - WIDTH))
    return ("..." if start else "") + line[start : start + WIDTH] + ("..." if start + WIDTH < len(line) else "")
