"""Run a function on several local ranks: one process each, joined by gloo over loopback.

The caller's process hosts the store through which the ranks find each other, on a port that was never free
in between, so there is no race for it. Every rank leads a process group of its own and follows a pipe to
the caller: whatever ends the call, nothing that a rank started is left behind.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from shardc.compiler.errors import RankFailure
from shardc.runtime.launch.launched import Job, run_rank

GRACE = 1.0  # seconds that the other ranks have, after a failure, to report what it did to them
ENDING = 10.0  # seconds for ranks that have returned to destroy their process group and exit
COLLECTIVE_TIMEOUT = 300.0  # seconds a collective waits for a rank before it is an error
PRELOADED = ["shardc.compiler.driver.compile", "shardc.runtime.checkpoint.checkpoint"]  # and with them torch
POLL = 0.5  # seconds; a rank's forked children can hold its pipes open, so its end is looked for as well


def launch(
    fn: Callable[..., Any],
    nproc: int = 4,
    args: Sequence[Any] = (),
    *,
    timeout: float | None = None,
    process_group: bool = True,
    start: Literal["spawn", "forkserver"] = "spawn",
) -> list[Any]:
    """Run `fn(rank, *args)` on `nproc` new local processes and return their results in rank order.

    Each rank has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, its share of
    the cores, and an initialised gloo process group, destroyed once every rank has returned.
    process_group=False leaves `init_process_group()` to fn. The processes import fn: it stands at the
    top level of a module, or of a script that calls launch under `if __name__ == "__main__":`. fn, args and
    results travel pickled, tensors by value. Nothing the ranks started outlives the call.

    start="forkserver": the ranks are forked from a server that has imported torch and shardc once, for programs
    that launch many times; a rank then starts in a fraction of a second. The server ends with this process.

    timeout: seconds for the whole call, start included. Raises RankFailure with the number and traceback of
    the first rank that failed (the others are stopped within about a second), or with the stacks of all once
    the time is over; TypeError where fn or args cannot be sent to a new process; ValueError for nproc < 1.
    """
    if not isinstance(nproc, int) or nproc < 1:
        raise ValueError(f"nproc={nproc!r}: launch needs at least one rank")
    deadline = None if timeout is None else time.monotonic() + timeout
    payload = _packed(fn, tuple(args))
    store, port = _loopback_store()
    seconds = max(COLLECTIVE_TIMEOUT, timeout or 0)
    job = Job(payload, nproc, port, seconds, process_group, _cores_per_rank(nproc), dict(os.environ))
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(PRELOADED)  # read only when a server starts
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="shardc-launch-") as folder:
        try:
            for number in range(nproc):
                _start(context, number, job, Path(folder) / f"stacks-{number}", ranks)
            results = _collected(ranks, deadline, timeout)
            _let_go(ranks)
            return results
        finally:
            _end(ranks)
            del store  # the ranks are gone; their store goes last


@dataclass
class _Rank:
    """A rank as the caller sees it."""

    number: int
    process: BaseProcess
    pipe: connection.Connection
    stacks: Path
    started: bool = False  # whether it has come as far as running our code
    result: list[Any] = field(default_factory=list)  # empty until fn has returned
    failure: _Failure | None = None

    @property
    def running(self) -> bool:
        return not self.result and self.failure is None

    def ended(self) -> bool:
        """Whether the process is over. It is not reaped: until then its number stays its own."""
        pid = self.process.pid
        assert pid is not None
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the fork server's child, or something else in this process has reaped it
            return bool(connection.wait([self.process.sentinel], 0))

    def look(self) -> None:
        """Take in what the rank has sent, and whether it has died."""
        over = self.ended()  # first: what it sent before its end is then in the pipe
        try:
            while self.pipe.poll():
                self._take(self.pipe.recv())
        except (EOFError, OSError):
            pass
        if over and self.running:
            self.failure = _Failure(self.number, 0.0, _death(self), _death_details(self))

    def _take(self, message: tuple) -> None:
        match message:
            case ("started",):
                self.started = True
            case ("returned", result):
                self.result = [pickle.loads(result)]
            case ("failed", when, summary, text):
                self.failure = _Failure(self.number, when, summary, text)

    def kill(self) -> None:
        """End the process and all of its process group."""
        pid = self.process.pid
        assert pid is not None
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has not made its group yet
            if not self.ended():
                self.process.kill()


@dataclass(frozen=True)
class _Failure:
    """What happened to a rank and when, in a line and in full. A death has time 0: before all its effects."""

    rank: int
    when: float
    summary: str
    text: str


def _packed(fn: Callable[..., Any], args: tuple) -> bytes:
    """fn and args as bytes. Raises TypeError, with what to do, where a new process could not import them."""
    name = getattr(fn, "__qualname__", repr(fn))
    if "<lambda>" in name or "<locals>" in name:
        raise TypeError(
            f"launch cannot run {name}: the ranks are new processes and import the function; "
            "define it at the top level of a module"
        )
    try:
        payload = pickle.dumps((fn, args))
    except Exception as error:
        raise TypeError(f"launch cannot send {name} or its args to new processes: {error}") from error
    if b"__main__" in payload and not _main_is_a_file():
        raise TypeError(
            f"launch cannot run {name}: it is defined in an interactive session, `python -c` or stdin, "
            "which new processes cannot import; put it in a file and import it from there"
        )
    return payload


def _main_is_a_file() -> bool:
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is not None or Path(getattr(main, "__file__", "") or "").is_file()


@contextmanager
def _importable_main() -> Iterator[None]:
    """A program read from stdin calls its file "<stdin>", which new processes would try to run."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or _main_is_a_file():
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path


def _loopback_store() -> tuple[TCPStore, int]:
    """A store served by this process on 127.0.0.1, and its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def _cores_per_rank(nproc: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // nproc)


def _start(context: Any, number: int, job: Job, stacks: Path, ranks: list[_Rank]) -> None:
    here, there = multiprocessing.Pipe()
    process = context.Process(target=run_rank, args=(number, job, there, str(stacks)), name=f"rank-{number}")
    try:
        with _importable_main():
            process.start()
    except BaseException:
        here.close()
        raise
    finally:
        there.close()  # else the rank's end of the pipe stays open here when it dies
    ranks.append(_Rank(number, process, here, stacks))


def _collected(ranks: list[_Rank], deadline: float | None, timeout: float | None) -> list[Any]:
    """Every rank's result. Raises RankFailure for the first failure, or when time is over."""
    failed_at = None
    while waiting := [r for r in ranks if r.running]:
        now = time.monotonic()
        if failed_at is not None and now > failed_at + GRACE:
            break
        if deadline is not None and now > deadline and failed_at is None:
            raise RankFailure(_expired(ranks, timeout))
        ends = [now + POLL, deadline, failed_at and failed_at + GRACE]
        pause = max(0.0, min(e for e in ends if e is not None) - now)
        connection.wait([w for r in waiting for w in (r.pipe, r.process.sentinel)], pause)
        for rank in waiting:
            rank.look()
        if failed_at is None and any(r.failure for r in ranks):
            failed_at = time.monotonic()
    if failed_at is not None:
        raise RankFailure(_failed(ranks))
    return [r.result[0] for r in ranks]


def _failed(ranks: list[_Rank]) -> str:
    """The first failure whole, those that came after it in a line each."""
    failures = sorted((r.failure for r in ranks if r.failure), key=lambda f: (f.when, f.rank))
    first, *others = failures
    lines = [f"rank {first.rank} of {len(ranks)} {first.summary}", first.text.rstrip()]
    lines += [f"after it, rank {f.rank} {f.summary}" for f in others]
    if stopped := [r.number for r in ranks if r.running]:
        lines.append(f"stopped while still running: {_ranks_text(stopped)}")
    return "\n".join(line for line in lines if line)


def _death(rank: _Rank) -> str:
    rank.kill()  # what it has started; its own number is still reserved
    rank.process.join(ENDING)
    code = rank.process.exitcode
    how = f"was killed by {_signal_name(-code)}" if code and code < 0 else f"ended with exit code {code}"
    return how if rank.started else f"{how} before it could run the function"


def _death_details(rank: _Rank) -> str:
    if not rank.started:
        return (
            "what it printed stands above. A script that calls launch does so under "
            '`if __name__ == "__main__":`, since the ranks import it'
        )
    return _stacks_of(rank)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _expired(ranks: list[_Rank], timeout: float | None) -> str:
    """What each rank was doing when time was over: every one writes its stacks, then they are read."""
    busy = [r for r in ranks if r.running]
    for rank in busy:
        if rank.started and not rank.ended() and rank.process.pid is not None:
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(GRACE)
    lines = [f"time is over after {timeout} s: {_ranks_text([r.number for r in busy])} still running"]
    for rank in busy:
        lines.append(f"--- rank {rank.number}: {'its stacks' if rank.started else 'had not started yet'}")
        lines.append(_stacks_of(rank))
    return "\n".join(line for line in lines if line)


def _stacks_of(rank: _Rank) -> str:
    """What the rank has written, less the thread that only follows us."""
    text = rank.stacks.read_text(errors="replace") if rank.stacks.exists() else ""
    threads = [t.rstrip() for t in text.split("\n\n")]
    return "\n\n".join(t for t in threads if not re.search(r" in _follow$", t, re.MULTILINE))


def _ranks_text(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _let_go(ranks: list[_Rank]) -> None:
    """All have returned: none can need another any more, so they may leave."""
    for rank in ranks:
        try:
            rank.pipe.send("leave")
        except OSError:  # it ended by itself after returning
            pass
    end = time.monotonic() + ENDING
    while any(not r.ended() for r in ranks) and (left := end - time.monotonic()) > 0:
        connection.wait([r.process.sentinel for r in ranks if not r.ended()], min(left, POLL))


def _end(ranks: list[_Rank]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.process.join(ENDING)
        rank.pipe.close()
        rank.process.close()
