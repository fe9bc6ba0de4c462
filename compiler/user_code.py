"""Which line of the user's own code something comes from: neither this package's, torch's nor Python's."""

from __future__ import annotations

import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

import torch

_PARTS = Path(__file__).parent.parent  # holds compiler, passes and runtime, installed or in a clone
_INSIDE = [*(_PARTS / part for part in ("compiler", "passes", "runtime")), Path(torch.__file__).parent]
_PREFIXES = (*(f"{folder}{os.sep}" for folder in _INSIDE), "<")
_PYTHONS = f"{Path(os.__file__).parent}{os.sep}"
_INSTALLED = tuple(f"{_PYTHONS}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))


@lru_cache(maxsize=4096)
def is_users(file: str) -> bool:
    """Whether a source file belongs to neither this package, torch nor Python; what runs from a string is theirs."""
    return not file.startswith(_PREFIXES) and (not file.startswith(_PYTHONS) or file.startswith(_INSTALLED))


def user_frame() -> FrameType:
    """The nearest caller outside of this package and of torch, through which a module's call comes."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def frame_of(code: CodeType) -> FrameType | None:
    """The nearest caller that runs this code."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def call_site() -> str:
    """`file.py:12` of the nearest caller outside of this package."""
    frame = user_frame()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def warn_user(text: str) -> None:
    """A UserWarning at the user's line, however deep this is called from."""
    frame = user_frame()
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry=seen)
