"""The per-device executor: order, threads, the caller's torch modes, and errors that keep type and story."""

import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from shardc.runtime.workers import run_on_devices

CPU = torch.device("cpu")


def in_threads(call: Callable[[], object]) -> list[object]:
    return run_on_devices([call, call], [CPU, CPU])


def test_results_come_in_the_order_of_the_calls():
    first_may_end = threading.Event()
    calls = [lambda: first_may_end.wait(10) and "slow", lambda: first_may_end.set() or "fast"]
    assert run_on_devices(calls, [CPU, CPU]) == ["slow", "fast"]


def test_calls_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=10)  # passes only if all three are there
    assert len(run_on_devices([meeting.wait] * 3, [CPU] * 3)) == 3


def test_each_call_has_a_thread_of_its_own_named_after_it():
    names = run_on_devices([lambda: threading.current_thread().name] * 2, [CPU] * 2, kind="rank")
    assert names == ["rank-0", "rank-1"]


def test_one_call_runs_in_the_callers_thread():
    assert run_on_devices([threading.current_thread], [CPU]) == [threading.current_thread()]


def test_no_call_gives_no_result():
    assert run_on_devices([], []) == []


def test_calls_and_devices_must_be_as_many():
    with pytest.raises(ValueError, match="1 calls for 2 devices"):
        run_on_devices([int], [CPU, CPU])


# --- modes

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast in half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast without cache": lambda: torch.autocast("cpu", cache_enabled=False),
}


def modes() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_hold_in_each_thread(mode: str):
    with MODES[mode]():
        assert in_threads(modes) == [modes(), modes()]


def test_modes_set_by_a_call_do_not_leak_to_the_caller():
    before = modes()
    in_threads(lambda: torch.set_grad_enabled(False))
    assert modes() == before


def test_context_variables_of_the_caller_are_seen_and_not_changed():
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("caller's")
    assert in_threads(lambda: (variable.get(), variable.set("call's"))[0]) == ["caller's"] * 2
    assert variable.get() == "caller's"


def test_each_call_has_its_accelerator_current_and_the_callers_stream_there(monkeypatch: pytest.MonkeyPatch):
    entered: dict[str, list[str]] = {}

    @contextmanager
    def entering(what: str) -> Iterator[None]:
        entered.setdefault(threading.current_thread().name, []).append(what)
        yield

    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: entering(f"device {index}"))
    caller = threading.current_thread()

    def current_stream(device: torch.device) -> AbstractContextManager[None]:
        assert threading.current_thread() is caller  # a new thread would have the default stream
        return entering(f"stream on {device}")

    monkeypatch.setattr(torch.accelerator, "current_stream", current_stream)
    run_on_devices([int, int, int], [torch.device("cuda", 0), torch.device("cuda", 1), CPU])
    assert entered == {
        "replica-0": ["device 0", "stream on cuda:0"],
        "replica-1": ["device 1", "stream on cuda:1"],
    }


# --- errors


class ManyArguments(Exception):
    def __init__(self, code: int, detail: str):
        self.code, self.detail = code, detail


class KeywordOnly(Exception):
    def __init__(self, *, code: int):
        super().__init__(f"code {code}")
        self.code = code


class OwnText(Exception):
    def __str__(self) -> str:
        return "own text"


class BrittleText(Exception):
    def __str__(self) -> str:
        return self.args[1]


ERRORS: list[Callable[[], BaseException]] = [
    lambda: ValueError("bad value"),
    lambda: KeyError("missing"),
    lambda: KeyError(("a", 1)),
    lambda: RuntimeError(),
    lambda: ManyArguments(7, "detail"),
    lambda: KeywordOnly(code=7),
    lambda: OwnText(),
    lambda: BrittleText("a", "b"),
    lambda: FileNotFoundError(2, "No such file", "weights.pt"),
    lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
    lambda: SystemExit(3),
    lambda: KeyboardInterrupt(),
]


def culprit(error: BaseException) -> None:
    raise error


def story(error: BaseException) -> str:
    """All that a printed traceback says after the frames."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("make", ERRORS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("alone", [False, True], ids=["in a thread", "in the caller's thread"])
def test_an_error_keeps_its_type_and_brings_number_device_and_traceback(make: Callable[[], BaseException], alone: bool):
    error = make()
    calls = [lambda: culprit(error)] if alone else [int, lambda: culprit(error)]
    with pytest.raises(type(error)) as caught:
        run_on_devices(calls, [CPU] * len(calls))
    assert type(caught.value) is type(error)
    told = story(caught.value)
    assert f"Caught {type(error).__name__} in replica {len(calls) - 1} on device cpu" in told
    assert "Original Traceback (most recent call last):" in told and "in culprit" in told


def test_the_message_of_an_ordinary_error_holds_the_story_and_the_original_message():
    with pytest.raises(ValueError, match=r"(?s)Caught ValueError in replica 1 .*ValueError: bad value"):
        run_on_devices([int, lambda: culprit(ValueError("bad value"))], [CPU, CPU])


def test_a_key_error_has_real_line_breaks():
    with pytest.raises(KeyError) as caught:
        in_threads(lambda: {}["missing"])
    assert "\\n" not in str(caught.value)
    assert str(caught.value).splitlines()[-1] == "KeyError: 'missing'"


@pytest.mark.parametrize("error", [ManyArguments(7, "detail"), KeywordOnly(code=7)], ids=["many", "keyword"])
def test_the_fields_of_an_error_survive(error: ManyArguments | KeywordOnly):
    with pytest.raises(type(error)) as caught:
        in_threads(lambda: culprit(error))
    assert caught.value.code == 7


def test_an_error_that_words_its_own_text_keeps_it():
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        in_threads(lambda: open("/nowhere/weights.pt"))
    assert caught.value.errno == 2 and caught.value.filename == "/nowhere/weights.pt"


def test_the_first_failure_in_order_is_raised_and_names_the_later_ones():
    second_failed = threading.Event()

    def first():
        second_failed.wait(10)
        raise ValueError("first")

    def second():
        second_failed.set()
        raise KeyError("second")

    with pytest.raises(ValueError, match="replica 0") as caught:
        run_on_devices([first, second], [CPU, CPU])
    assert caught.value.__notes__ == ["replica 1 on device cpu failed too: KeyError('second')"]


def test_the_other_calls_run_to_their_end_when_one_fails():
    failed, done = threading.Event(), []

    def fails():
        failed.set()
        raise ValueError

    with pytest.raises(ValueError):
        run_on_devices([fails, lambda: failed.wait(10) and done.append(True)], [CPU, CPU])
    assert done == [True]


def test_a_kind_other_than_replica_is_named():
    with pytest.raises(ValueError, match="in rank 0 on device cpu"):
        run_on_devices([lambda: culprit(ValueError())], [CPU], kind="rank")


class Value:
    """Stands for an activation."""


def test_a_held_error_does_not_hold_the_values_of_the_failed_call():
    made: list[weakref.ref[Value]] = []

    def fails() -> None:
        value = Value()
        made.append(weakref.ref(value))
        raise ValueError(f"with {type(value)} at hand")

    with pytest.raises(ValueError, match="at hand") as caught:
        run_on_devices([int, fails], [CPU, CPU])
    assert made[0]() is None, caught


def test_a_dropped_error_holds_no_result_until_the_next_collection():
    made: list[weakref.ref[Value]] = []

    def succeeds() -> Value:
        value = Value()
        made.append(weakref.ref(value))
        return value

    gc.disable()
    try:
        with pytest.raises(ValueError):
            run_on_devices([succeeds, lambda: culprit(ValueError())], [CPU, CPU])
        assert made[0]() is None
    finally:
        gc.enable()
