"""Ranks start, report, fail and end as promised; nothing they started is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardc.compiler.errors import RankFailure
from shardc.runtime.launch.launch import launch
from tests.runtime.ranks import LIMIT, START, on_ranks, run_ranks

ROOT = Path(__file__).parents[3]


def introduce(rank: int, scale: float) -> dict:
    total = torch.full((2,), scale * (rank + 1))
    dist.all_reduce(total)
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    return {
        "rank": rank,
        "total": total,
        "env": [os.environ[k] for k in keys],
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
    }


@on_ranks
def test_results_come_in_rank_order_from_joined_ranks():
    found = run_ranks(introduce, 2, (10.0,))
    assert [f["rank"] for f in found] == [0, 1]
    for rank, f in enumerate(found):
        assert torch.equal(f["total"], torch.tensor([30.0, 30.0]))
        assert f["env"] == [str(rank), str(rank), "2", "127.0.0.1", "lo"]
        assert f["backend"] == "gloo"
        assert f["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def join_by_environment(rank: int) -> tuple[bool, int]:
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    return before, dist.get_world_size()


@on_ranks
def test_the_function_may_initialise_the_process_group_itself():
    assert launch(join_by_environment, 2, timeout=LIMIT, process_group=False) == [(False, 2)] * 2


def fail(rank: int, how: str, folder: str) -> None:
    """Rank 1 fails; rank 0 waits for it in a collective. Both have a child process by then."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(folder, f"{rank}.pids").write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    if rank == 0:
        dist.recv(torch.empty(1), src=1)
    elif how == "raise":
        raise ValueError("boom\nin two lines")
    elif how == "exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    else:
        wait_for_ever()


def wait_for_ever() -> None:
    time.sleep(1000)


def nothing_left(folder: Path, within: float = 5.0) -> None:
    """Every process whose number was noted in the folder is gone, or at least dead."""
    pids = [int(p) for file in folder.glob("*.pids") for p in file.read_text().split()]
    assert len(pids) == 4
    end = time.monotonic() + within
    while alive := [p for p in pids if is_alive(p)]:
        assert time.monotonic() < end, f"still running: {alive}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


FAILURES = {
    "raise": ("rank 1 of 2 failed: ValueError: boom ...\nTraceback", 'raise ValueError("boom'),
    "exit": ("rank 1 of 2 ended with exit code 3\n", "rank 0 failed: RuntimeError: "),
    "kill": ("rank 1 of 2 was killed by SIGKILL\n", "rank 0 failed: RuntimeError: "),
    "crash": ("rank 1 of 2 was killed by SIGSEGV\n", "test_launch.py"),
}


@on_ranks
@pytest.mark.parametrize("how", FAILURES)
def test_the_first_failure_is_told_and_nothing_is_left(how: str, tmp_path: Path):
    with pytest.raises(RankFailure) as caught:
        run_ranks(fail, 2, (how, str(tmp_path)))
    start, contained = FAILURES[how]
    assert str(caught.value).startswith(start)
    assert contained in str(caught.value)
    nothing_left(tmp_path, within=1)


@on_ranks
def test_over_time_the_ranks_tell_where_they_are(tmp_path: Path):
    run_ranks(introduce, 2, (1.0,))  # a fork server is there from now on
    start = time.monotonic()
    limit = 25.0 if START == "spawn" else 6.0
    with pytest.raises(RankFailure) as caught:
        run_ranks(fail, 2, ("hang", str(tmp_path)), limit=limit)
    assert time.monotonic() - start < limit + 5
    zero, one = str(caught.value).split("--- rank 1: its stacks")
    assert zero.startswith(f"time is over after {limit} s: ranks 0, 1 still running\n--- rank 0: its stacks")
    assert " in recv\n" in zero and " in fail\n" in zero
    assert " in wait_for_ever\n" in one and " in _follow" not in one
    nothing_left(tmp_path, within=1)


def return_what_cannot_travel(rank: int) -> object:
    return (lambda: rank) if rank == 0 else None


def look_around(rank: int) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith("SHARDC_SEEN")}


@on_ranks
def test_forked_ranks_have_the_environment_of_the_call(monkeypatch: pytest.MonkeyPatch):
    for name in ("SHARDC_SEEN_ONE", "SHARDC_SEEN_TWO"):  # the server keeps what it found when it started
        monkeypatch.setenv(name, "1")
        assert launch(look_around, 2, timeout=LIMIT, start="forkserver") == [{name: "1"}] * 2
        monkeypatch.delenv(name)


@on_ranks
def test_a_result_that_cannot_be_pickled_is_a_failure():
    with pytest.raises(RankFailure, match=r"^rank 0 of 2 failed: .*pickle"):
        run_ranks(return_what_cannot_travel, 2)


def test_refused_before_anything_starts():
    with pytest.raises(TypeError, match="launch cannot run .*<lambda>: .*define it at the top level of a module"):
        launch(lambda rank: rank)

    def local(rank: int) -> int:
        return rank

    with pytest.raises(TypeError, match="launch cannot run .*local: the ranks are new processes"):
        launch(local)
    with pytest.raises(TypeError, match="launch cannot send introduce or its args"):
        launch(introduce, 2, (lambda: 1,))
    for nproc in (0, -1, 1.5):
        with pytest.raises(ValueError, match="launch needs at least one rank"):
            launch(introduce, nproc)  # pyright: ignore[reportArgumentType]


def python(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], input=stdin, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )


FROM_ELSEWHERE = """
from shardc.runtime.launch.launch import launch
from tests.runtime.launch.test_launch import introduce
print([found["rank"] for found in launch(introduce, 2, (1.0,))])
"""
ITS_OWN = """
from shardc.runtime.launch.launch import launch
def fn(rank): return rank
launch(fn, 2)
"""


@on_ranks
def test_a_program_from_stdin_launches_what_can_be_imported():
    done = python("-", stdin=FROM_ELSEWHERE)
    assert done.stdout.endswith("[0, 1]\n"), done.stderr


@on_ranks
def test_a_function_of_an_interactive_program_is_refused():
    for done in (python("-c", ITS_OWN), python("-", stdin=ITS_OWN)):
        assert "TypeError: launch cannot run fn: it is defined in an interactive session" in done.stderr


@on_ranks
def test_a_script_without_a_guard_is_told_so(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(ITS_OWN)
    told = python(str(script)).stderr
    assert re.search(r"RankFailure: rank [01] of 2 ended with exit code 1 before it could run the function", told)
    assert 'does so under `if __name__ == "__main__":`' in told


GUARDED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background shells have it ignored
from shardc.runtime.launch.launch import launch
from tests.runtime.launch.test_launch import fail
if __name__ == "__main__":
    launch(fail, 2, ("hang", sys.argv[1]))
"""


@on_ranks
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_caller(how: signal.Signals, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(GUARDED)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=env, stderr=subprocess.PIPE) as caller:
        end = time.monotonic() + LIMIT
        while len(list(tmp_path.glob("*.pids"))) < 2 and caller.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        caller.send_signal(how)
        try:
            caller.wait(LIMIT / 2)
        finally:
            caller.kill()
    nothing_left(tmp_path)
