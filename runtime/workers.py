"""One thread per device: runs a call on each, in the caller's torch modes, and brings its errors back.

torch keeps grad mode, inference mode, autocast and the current device and stream per thread, so a new thread
would start without them.
"""

import contextvars
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def run_on_devices(
    calls: Sequence[Callable[[], T]], devices: Sequence[torch.device], *, kind: str = "replica"
) -> list[T]:
    """The results of the calls, in order. Call i has device i current; one call alone runs in this thread.

    Every call runs to its end. Then the first failure in order is raised: the exception itself, its message
    extended by kind, number, device and original traceback; the failures after it are named in its notes. Without
    a kind it is raised as it is.
    """
    if len(calls) != len(devices):
        raise ValueError(f"{len(calls)} calls for {len(devices)} devices")
    modes = _Modes.of_this_thread(devices)
    slots = [_Slot(call, device) for call, device in zip(calls, devices, strict=True)]
    if len(slots) == 1:
        slots[0].run()
    else:
        _run_in_threads(slots, modes, kind)
    failure = _first_failure(slots, kind)
    if failure is None:
        return [result for slot in slots for result in slot.results]
    try:
        raise failure
    finally:
        # else failure, traceback and this frame would keep each other, and all results, alive
        del failure, slots


@dataclass(frozen=True)
class _Modes:
    """What torch keeps per thread, read in the caller's."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    autocast_cache: bool

    @staticmethod
    def of_this_thread(devices: Sequence[torch.device]) -> "_Modes":
        kinds = dict.fromkeys(["cpu", *(device.type for device in devices)])
        return _Modes(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)),
            autocast_cache=torch.is_autocast_cache_enabled(),
        )

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode(self.inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))  # after inference mode, which sets it too
        for kind, dtype in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.autocast_cache))


class _Slot(Generic[T]):
    """One call on its device, and what came of it: one result, or an error with the text of its traceback."""

    def __init__(self, call: Callable[[], T], device: torch.device) -> None:
        self.call, self.device = call, device
        # the caller's stream there, read in the caller's thread
        self.stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.text = ""

    def run(self, modes: _Modes | None = None) -> None:
        try:
            with ExitStack() as stack:
                if self.stream is not None:
                    stack.enter_context(torch.accelerator.device_index(self.device.index))
                    stack.enter_context(self.stream)
                if modes is not None:
                    modes.enter(stack)
                self.results.append(self.call())
        except BaseException as error:  # a thread that let SystemExit pass would end without a word
            self.text = "".join(traceback.format_exception(error))
            self.error = error.with_traceback(None)  # its frames would keep every activation alive


def _run_in_threads(slots: Sequence[_Slot[T]], modes: _Modes, kind: str) -> None:
    threads = [
        threading.Thread(
            # a copy each: one context cannot be entered twice at the same time
            target=contextvars.copy_context().run,
            args=(slot.run, modes),
            name=f"{kind}-{i}",
        )
        for i, slot in enumerate(slots)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _first_failure(slots: Sequence[_Slot[T]], kind: str) -> BaseException | None:
    failed = [(i, slot, slot.error) for i, slot in enumerate(slots) if slot.error is not None]
    if not failed:
        return None
    i, slot, error = failed[0]
    if not kind:
        return error
    where = f"in {kind} {i} on device {slot.device}"
    _tell(error, f"Caught {type(error).__name__} {where}.\nOriginal {slot.text}")
    for j, other, also in failed[1:]:
        error.add_note(f"{kind} {j} on device {other.device} failed too: {also!r}")
    return error


class _Verbatim(str):
    """Text whose repr is itself: KeyError shows the repr of its argument, which escapes every line break."""

    def __repr__(self) -> str:
        return str(self)


def _tell(error: BaseException, message: str) -> None:
    """Puts the message where str(error) shows it. No constructor is called: its arguments are unknown."""
    args = error.args
    error.args = (_Verbatim(message),)
    if not _shows(error, message):  # the type words its own text, from fields that stay as they are
        error.args = args
        error.add_note(message)


def _shows(error: BaseException, message: str) -> bool:
    try:
        return message in str(error)
    except Exception:  # a __str__ that needs the arguments it was made with
        return False
