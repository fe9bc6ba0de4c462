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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from shardc.compiler.errors import RankFailure, RankMismatchError
from shardc.compiler.user_code import call_site
from shardc.runtime.wire.groups import Groups
from shardc.runtime.wire.meeting import About, Door, Sums

TIMEOUT = 300.0  # seconds: ranks compile at different speed, more so with a cold cache on one of them
POST = 4 << 20  # bytes of a posted text, a multiple of 4; the store breaks the connection at 8 MiB
WIDTH = 160  # characters of a line that a message shows
PLACE_WAIT = 5.0  # seconds for where the others are, who learn at the same moment that they are out of step
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
    line that does; or those that did not come within `timeout` seconds, or within
    the process group's timeout where that is less; or that the store is gone.
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
        limit = _store().timeout.total_seconds()  # pyright: ignore[reportAttributeAccessIssue]
        _Round(me, everyone, what, lines, call).hold(min(timeout, limit))
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
        self.epoch = 0  # how often all gave a call up, and began to count again
        self.doors: dict[str, Door] = {}  # by mesh dim
        self.what = ""  # what of a call this rank does, or did last
        self.failed = ""  # how a call ended here in the middle of what it moves, if it did

    @contextmanager
    def entering(self) -> Iterator[None]:
        """One more call begins: what is compared meanwhile is compared for it."""
        self.number += 1
        self.entered = self.number
        try:
            yield
        except RankMismatchError as error:
            if error.together:
                self.give_up()
            raise
        finally:
            self.entered = 0

    def give_up(self) -> None:
        """All ranks end their call by the same error, before anything of it has moved."""
        self.epoch, self.number = self.epoch + 1, 0

    @contextmanager
    def moving(
        self,
        lines: Sequence[Any],
        what: str,
        large: Collection[str] = (),
        given: Mapping[str, Sums] = MappingProxyType({}),
    ) -> Iterator[None]:
        """Around what moves values along these lines, of the present call. what: its name, the same on every rank.
        large: the mesh dims over which the first message is one. given: by mesh dim, sums of what its ranks share.
        Raises RankMismatchError where the ranks do not do the same, or did not where a call failed before."""
        if self.failed:
            agree(self.failed, self.ranks, "how an earlier call ended", call=self.number)
            self.failed = ""
        self.what = what
        digest = zlib.crc32(what.encode())
        for line in lines:
            line.open(About(self.epoch, self.number, digest, given.get(line.axis, Sums())), line.axis in large)
        try:
            yield
            for line in lines:
                line.settle()
        except BaseException as error:
            told = [line.door.give_up() for line in lines]
            if isinstance(error, RankMismatchError) and error.together and all(told):
                self.give_up()
            else:
                issued = ", ".join(f"{line.door.issued} over {line.axis}" for line in lines)
                self.failed = f"call {self.number}, {what}: {type(error).__name__} after {issued or 'nothing'} moved"
                self._post("failed", f"{self.epoch} {self.number} {type(error).__name__}: {error}")
            raise

    def out_of_step(self, line: str, ranks: Sequence[int], said: Sequence[About]) -> RankMismatchError:
        """What to raise where ranks of a line are about to do different things."""
        self._post("place", f"call {self.number}, {self.what}, at {call_site()}")
        members, end = _members(self.ranks), time.monotonic() + PLACE_WAIT
        keys = {rank: f"place/{rank}" for rank in ranks}
        while not members.check([*keys.values()]) and time.monotonic() < end:
            time.sleep(0.01)
        places = {r: members.get(key).decode() if members.check([key]) else "elsewhere" for r, key in keys.items()}
        alike = all(other[:3] == said[0][:3] for other in said)
        what = "are given different values of an input that is not split there" if alike else "are out of step"
        help = (
            "give all of them the same, or say how it is split: compile(..., inputs=); or a rank made a call more"
            if alike
            else "every rank must make the same calls in the same order; look for a branch by rank, an error that one "
            "rank caught, a forward more, a backward less"
        )
        lines = [f"ranks along {line} {what}:", *(f"  rank {r}: {place}" for r, place in places.items())]
        lines.append(f"help: {help}")
        return RankMismatchError("\n".join(lines))

    def _post(self, kind: str, text: str) -> None:
        _members(self.ranks).set(f"{kind}/{dist.get_rank()}", text[:POST])

    def look(self) -> None:
        """Raises RankMismatchError where another rank compares programs before the call that this one is in, or before
        one that this one has passed."""
        if not dist.is_initialized() or dist.get_backend() == "fake":
            return
        me, members = dist.get_rank(), _members(self.ranks)
        for other in self.ranks:
            if other != me and members.check([f"failed/{other}"]):
                epoch, number, text = members.get(f"failed/{other}").decode().split(" ", 2)
                if (int(epoch), int(number)) == (self.epoch, self.number):
                    raise RankFailure(f"rank {other} ended this call by an error: {text}")
            if other != me and members.check([f"left/{other}"]):
                raise RankFailure(f"rank {other} has ended, and takes no part in this call")
            if other == me or not members.check([f"at/{other}"]):
                continue
            number, call = members.get(f"at/{other}").decode().split()
            verdict = f"apart {me} {other}"
            board = PrefixStore(number, members)
            passed = call.isdigit() and int(call) <= self.number  # what all agreed on has its verdict
            found = board.compare_set("verdict", "", verdict).decode() if passed else ""
            if found.startswith("apart"):  # said by this rank, or by another that waits too
                raise _together(_apart(*found.split()[1:]))


COUNTED: dict[tuple[int, ...], Calls] = {}


def calls_of(ranks: tuple[int, ...]) -> Calls:
    """The one count that all compiled modules on these ranks share."""
    return COUNTED.setdefault(ranks, Calls(ranks))


def leave() -> None:
    """Let the others know that this rank makes no more calls."""
    for ranks in COUNTED if dist.is_initialized() and dist.get_backend() != "fake" else ():
        _members(ranks).set(f"left/{dist.get_rank()}", "")


def _members(ranks: tuple[int, ...]) -> PrefixStore:
    return PrefixStore(f"shardc/agree/{_digest(repr(ranks))}", _store())


def _together(text: str) -> RankMismatchError:
    """What all ranks raise, of one comparison."""
    error = RankMismatchError(text)
    error.together = True
    return error


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
        self.board, self.members = PrefixStore(str(number), members), members
        members.set(f"at/{me}", f"{number} {call or 'none'}")

    def hold(self, timeout: float) -> None:
        """Raises RankMismatchError unless all ranks come within the timeout, with equal texts."""
        self.board.set(f"note/{self.me}", f"{_digest(self.text)} {self.what}")
        missing = self._wait_for("note", self.ranks, timeout)
        notes = {} if missing else self._notes()
        ended = [r for r in missing if self.members.check([f"left/{r}"])]
        found = (
            f"ended {_listed(ended)}"
            if ended
            else f"missing {_listed(missing)}"
            if missing
            else "same"
            if _alike(notes)
            else "differ"
        )
        verdict = self.board.compare_set("verdict", "", found).decode()  # whoever is first speaks for all
        if verdict == "differ":
            raise _together(self._difference(self._notes()))
        if verdict.startswith("apart"):
            raise _together(_apart(*verdict.split()[1:]))
        if verdict.startswith("ended"):
            raise _together(f"{self.what}: rank {verdict.removeprefix('ended ')} has ended, and does not compare it")
        if verdict != "same":
            raise _together(self._absence(verdict.removeprefix("missing "), timeout))

    def _wait_for(self, kind: str, ranks: Sequence[int], timeout: float) -> list[int]:
        """The ranks whose key of this kind is not there when time is over, or when a verdict is."""
        end, pause = time.monotonic() + timeout, 0.001
        while not self.board.check([f"{kind}/{r}" for r in ranks]):
            over = time.monotonic() > end or (kind == "note" and self.board.check(["verdict"]))
            if over or any(self.members.check([f"left/{r}"]) for r in ranks):
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
