"""What a process that `launch` starts does: join the others, run the function, report, leave."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from shardc.runtime.wire.handshake import leave as leave_calls


@dataclass(frozen=True)
class Job:
    """What all ranks of one launch are told."""

    payload: bytes  # (fn, args), unpickled only once the environment is set
    nproc: int
    port: int
    collective_timeout: float  # seconds
    process_group: bool
    threads: int
    environment: dict[str, str]  # the caller's, as it is now; a fork server has that of its start


def run_rank(rank: int, job: Job, pipe: Connection, stacks: str) -> None:
    """The whole life of rank `rank`. stacks: the file for the stacks of a crash, or of a wait without end."""
    os.setpgid(0, 0)  # the caller ends this group, and with it whatever fn starts
    leave = threading.Event()
    threading.Thread(target=_follow, args=(pipe, leave), name="follow-caller", daemon=True).start()
    file = open(stacks, "w")  # never closed: faulthandler may write to it to the very end
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    pipe.send(("started",))
    try:
        result = _run(rank, job)
    except BaseException as error:  # sys.exit() in a rank is a failure too
        text = "".join(traceback.format_exception(error))
        pipe.send(("failed", time.monotonic(), f"failed: {_in_a_line(error)}", text))
        _drop_out()
    leave_calls()
    pipe.send(("returned", result))
    leave.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(rank: int, job: Job) -> bytes:
    os.environ.clear()
    os.environ.update(
        job.environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.nproc),
        LOCAL_WORLD_SIZE=str(job.nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        GLOO_SOCKET_IFNAME="lo",
        TORCHELASTIC_USE_AGENT_STORE="True",  # init_process_group() joins the caller's store and serves none
    )
    torch.set_num_threads(job.threads)
    if job.process_group:
        timeout = timedelta(seconds=job.collective_timeout)
        store = TCPStore("127.0.0.1", job.port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.nproc, timeout=timeout)
    fn, args = pickle.loads(job.payload)
    return pickle.dumps(fn(rank, *args))


def _follow(pipe: Connection, leave: threading.Event) -> None:
    """Wait for the caller's word. Once the caller is gone, so is this rank with all that it started."""
    try:
        pipe.recv()
        leave.set()
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _in_a_line(error: BaseException) -> str:
    first, *rest = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}{' ...' if rest else ''}"


def _drop_out() -> NoReturn:
    """End at once: the closed connections wake the ranks that wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(1)
