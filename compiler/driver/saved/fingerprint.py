"""What tracing a module depends on, as digests: its classes' source, its plain attributes, its parts' names.

Values of parameters and buffers do not count, as no program holds them.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = re.compile("^_(forward|backward).*_hooks")
ROOMS = Path(__file__).parents[2]
TRACER = ("trace", "ir", "rules", "spec")
FRAMEWORK = "torch."  # whose source its version stands for


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Digests by what they are of: "module layers.0" -> its class and attributes, "source model" -> a file."""
    found = {}
    for name, owner in module.named_modules():
        found[f"module {name}".strip()] = _digest("\n".join(_described(owner)))
    for name in sorted({type(owner).__module__ for owner in module.modules()}):
        if not f"{name}.".startswith(FRAMEWORK):
            found[f"source {_plain(name)}"] = _digest(_source(name))
    return found | {"source of the tracer": tracer()}


@cache
def tracer() -> str:
    """What traces, and what it writes into a graph."""
    files = sorted(path for room in TRACER for path in (ROOMS / room).rglob("*.py"))
    return _digest(b"".join(path.read_bytes() for path in files))


def _described(owner: nn.Module) -> Iterator[str]:
    yield f"{_plain(type(owner).__module__)}.{type(owner).__qualname__}"
    for table in (owner._parameters, owner._buffers, owner._modules):
        yield repr(list(table))
    for name, value in sorted(vars(owner).items()):
        if name not in vars(_BLANK) or (value and HOOKS.search(name)):
            yield f"{name}={_text(value, ())}"


_BLANK = nn.Module()


def _text(value: Any, above: tuple[int, ...]) -> str:
    """A value as text that is the same in every process, for what is inside it too."""
    if id(value) in above:
        return "..."
    inside = (*above, id(value))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1) if not value.is_meta else torch.empty(0)
        return f"{tuple(value.shape)} {value.dtype} {_digest(flat.view(torch.uint8).numpy().tobytes())}"
    if isinstance(value, functools.partial):
        return f"partial {_text((value.func, value.args, value.keywords), inside)}"
    if isinstance(value, (types.FunctionType, types.MethodType)):
        code, cells = value.__code__, [cell.cell_contents for cell in value.__closure__ or ()]
        held = _plain_constants(code), value.__defaults__, value.__kwdefaults__, cells  # pyright: ignore
        return f"{value.__qualname__} {_digest(code.co_code)} {_text(held, inside)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(k, inside)}: {_text(v, inside)}" for k, v in value.items()) + "}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_text(item, inside) for item in value))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item, inside) for item in value)}]"
    if isinstance(value, nn.Module):
        return type(value).__qualname__  # described under its own name
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return f"{type(value).__qualname__} {_text(vars(value), inside)}"


def _plain_constants(code: types.CodeType) -> tuple[Any, ...]:
    return tuple(c for c in code.co_consts if not isinstance(c, types.CodeType))


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # typed in, or built in
        return ""


def _plain(module: str) -> str:
    """Spawned processes know the script that started them under another name."""
    return "__main__" if module == "__mp_main__" else module


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
