"""Ranks that agree go on, ranks that do not all hear the same error: soon, and never by waiting for ever."""

import random
import time
from collections.abc import Sequence
from threading import Thread

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh

from shardc.compiler.errors import RankMismatchError
from shardc.runtime.wire import handshake
from shardc.runtime.wire.groups import Groups
from shardc.runtime.wire.handshake import agree
from tests.runtime.ranks import on_ranks, run_ranks

PROGRAM = "mesh tp=2\n%x: f32[8@tp] = input\n%y: f32[8@tp] = aten.relu(%x)\nreturn %y"
OTHER = PROGRAM.replace("aten.relu(%x)", "aten.gelu(%x)")


class Hall:
    """Ranks as threads around one store: the protocol without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = HashStore()
        monkeypatch.setattr(handshake, "_store", lambda: store)

    def round(
        self, texts: Sequence[str | None], what: Sequence[str] | str = "the program", timeout: float = 20.0
    ) -> list[str]:
        """What each rank with a text hears; "" is agreement."""
        ranks = tuple(range(len(texts)))
        told = [""] * len(texts)

        def attend(rank: int, text: str) -> None:
            subject = what if isinstance(what, str) else what[rank]
            try:
                handshake._Round(rank, ranks, subject, text, 0).hold(timeout)
            except RankMismatchError as error:
                told[rank] = str(error)

        threads = [Thread(target=attend, args=(r, text)) for r, text in enumerate(texts) if text is not None]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return told


@pytest.fixture
def hall(monkeypatch: pytest.MonkeyPatch) -> Hall:
    return Hall(monkeypatch)


def test_equal_texts_agree_again_and_again(hall: Hall):
    for _ in range(3):
        assert hall.round([PROGRAM] * 4) == [""] * 4


def test_every_rank_hears_who_differs_and_where(hall: Hall):
    told = hall.round([PROGRAM, PROGRAM, OTHER, PROGRAM])
    digests = [handshake._digest(text) for text in (PROGRAM, OTHER)]
    expected = f"""\
the program differs between ranks: rank 2 against ranks 0, 1, 3
  ranks 0, 1, 3: {digests[0]} the program
  rank 2: {digests[1]} the program
first difference, line 3:
  rank 0: %y: f32[8@tp] = aten.relu(%x)
  rank 2: %y: f32[8@tp] = aten.gelu(%x)
help: every rank needs the same code, plan, options and input sizes"""
    assert told == [expected] * 4
    assert hall.round([PROGRAM] * 4) == [""] * 4


def test_equal_camps_are_compared_in_rank_order_and_a_shorter_text_is_shown(hall: Hall):
    told = hall.round([PROGRAM, PROGRAM + "\nmore"])
    assert told[0] == told[1]
    assert "rank 1 against rank 0\n" in told[0]
    assert "line 5:\n  rank 0: (the text ends before this line)\n  rank 1: more\n" in told[0]


def test_ranks_at_different_points_hear_what_each_compares(hall: Hall):
    told = hall.round(["1", "1"], what=["the program", "input sizes"])
    assert told[0].splitlines()[1:3] == [
        f"  rank 0: {handshake._digest('1')} the program",
        f"  rank 1: {handshake._digest('1')} input sizes",
    ]
    assert "rank 1 against rank 0" in told[1]


def test_a_missing_rank_is_named_and_hears_it_when_it_comes(hall: Hall):
    start = time.monotonic()
    told = hall.round([PROGRAM, PROGRAM, None], timeout=0.3)
    assert time.monotonic() - start < 5
    sentence = "the program: rank 2 did not come to compare it within 0.3 s"
    assert all(text.startswith(f"{sentence}; it is compared by ranks 0, 1, 2\n") for text in told[:2])
    late = hall.round([None, None, PROGRAM], timeout=0.3)
    assert late[2].startswith(f"{sentence} (this rank came after that); ")
    assert hall.round([PROGRAM] * 3) == [""] * 3


def test_whoever_comes_first_decides_for_all(hall: Hall):
    """Ranks that give up at slightly different times around a late one never part ways."""
    rng = random.Random(0)
    for _ in range(20):
        hush = rng.uniform(0, 0.02)
        told: list[list[str]] = [[], []]
        early = Thread(target=lambda told=told: told[0].extend(hall.round(["a", None], timeout=0.01)))
        early.start()
        time.sleep(hush)
        told[1] = hall.round([None, "a"], timeout=0.01)
        early.join(30)
        assert bool(told[0][0]) == bool(told[1][1]), told


def test_long_lines_are_shown_around_the_difference():
    line = "x" * 1000 + "HERE" + "y" * 1000
    shown = handshake._window(line, 1000)
    assert shown.startswith("...x") and "HERE" in shown and shown.endswith("y...")
    assert len(shown) == handshake.WIDTH + 6
    assert handshake._window("short", 3) == "short"


def test_a_text_too_long_for_the_store_is_posted_in_part():
    rng = random.Random(0)
    text = "\n".join(str(rng.getrandbits(400)) for _ in range(60_000))
    posted = handshake._packed(text)
    assert len(posted) == handshake.POST
    read = handshake._unpacked(posted.encode())
    assert text.startswith(read) and len(read) > 5_000_000


def test_without_a_process_group_there_is_nobody_to_ask():
    agree("anything", None, "the program")


def test_a_store_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch):
    def gone():
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(handshake, "_store", gone)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    with pytest.raises(RankMismatchError, match="^the program: the store is gone, .*Broken pipe"):
        agree("text", (0, 1), "the program")


@pytest.mark.parametrize(("call", "verdict", "apart"), [(7, "", True), (8, "", False), (7, "same", False)])
def test_a_rank_that_waits_learns_who_is_elsewhere_in_the_same_call(
    call: int, verdict: str, apart: bool, monkeypatch: pytest.MonkeyPatch
):
    """Not where the other is a call ahead, or where the two have compared and the other is only not told yet."""
    store = dist.HashStore()
    monkeypatch.setattr(handshake, "_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    other = handshake._Round(1, (0, 1), "the program for this call", "text", call)
    if verdict:
        other.board.set("verdict", verdict)
    calls = handshake.Calls((0, 1))
    calls.number = 7
    if not apart:
        calls.look()
        return
    with pytest.raises(RankMismatchError, match="rank 0 runs .* rank 1 was called"):
        calls.look()
    with pytest.raises(RankMismatchError, match="rank 0 runs .* rank 1 was called"):
        other.hold(timeout=5)


def talk(rank: int) -> list[str]:
    """What this real rank hears in a row of rounds."""

    def heard(*args, **kwargs) -> str:
        start = time.monotonic()
        try:
            agree(*args, **kwargs)
        except RankMismatchError as error:
            assert time.monotonic() - start < 5
            return str(error)
        return ""

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    told = [
        heard(PROGRAM, None, "the program"),
        heard(OTHER if rank == 3 else PROGRAM, Groups(mesh), "the program"),
        heard([("x", (4 + rank % 2, 8))], None, "input sizes"),
        heard(str(rank), (rank,), "alone"),
        heard(str(rank % 2), (1, 3), "odd ranks"),
    ]
    if rank != 2:
        told.append(heard(PROGRAM, None, "the program", timeout=1))
    dist.barrier()
    if rank == 2:
        told.append(heard(PROGRAM, None, "the program", timeout=1))
    dist.barrier()
    told.append(heard(PROGRAM, None, "the program"))
    return told


@on_ranks
def test_real_ranks_hear_the_same_in_every_round():
    told = run_ranks(talk, 4)
    for same in told[1:]:
        assert same[:5] == told[0][:5]
    agreed, program, sizes, alone, odd, missing, again = told[0]
    assert agreed == alone == odd == again == ""
    assert program.startswith("the program differs between ranks: rank 3 against ranks 0, 1, 2\n")
    assert "line 3:\n  rank 0: %y: f32[8@tp] = aten.relu(%x)\n  rank 3: %y: f32[8@tp] = aten.gelu(%x)" in program
    assert "line 1:\n  rank 0: ('x', (4, 8))\n  rank 1: ('x', (5, 8))\n" in sizes
    assert missing.startswith("the program: rank 2 did not come to compare it within 1 s; ")
    assert "(this rank came after that)" in told[2][5]
