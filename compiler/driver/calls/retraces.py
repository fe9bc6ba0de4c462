"""Why a call needs a program of its own though others were made: what is another than at the nearest of those calls."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from shardc.compiler.spec.spec import DTYPES
from shardc.compiler.user_code import warn_user

log = logging.getLogger(__name__)
MANY = 8  # programs that one thing may make before it is warned of
WHATS = ("", "what is passed", "train() or eval()", "requires_grad or dtype of parameters", "grad mode or autocast")


class Retraces:
    """Says of each program why it was made, and warns once of what makes one again and again."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._made: Counter[str] = Counter()

    def said(self, number: int, seconds: float, reasons: Mapping[str, str]) -> None:
        """reasons: what is another now, and from what to what."""
        if not reasons:
            log.info("program %d, %.1f s", number, seconds)
            return
        log.info("program %d, %.1f s: %s", number, seconds, ", ".join(f"{a} {b}" for a, b in reasons.items()))
        if len(reasons) == 1:
            (what,) = reasons
            self._made[what] += 1
            if self._made[what] == MANY:
                warn_user(
                    f"{what} has made {MANY} programs, one for each value: each is traced and compiled anew. "
                    "Pass what changes from call to call as a tensor (or a buffer that forward writes); "
                    "for sizes there is dynamic=True"
                )

    def reasons(
        self, key: tuple, known: Iterable[tuple], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, str]:
        """What differs from the call among those known that differs least; nothing where there is none."""
        names = self._names(args, kwargs)
        return min((_differences(key, other, names) for other in known), key=len, default={})

    def _names(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """Of every leaf of a call, by forward's own names where it has them."""
        try:
            taken = [*inspect.signature(self._module.forward).parameters]
        except (TypeError, ValueError):
            taken = []
        leaves, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        out = []
        for path, _ in leaves:
            keys: tuple[Any, ...] = path
            side, first = keys[:2]
            where = first.key if side.idx else (taken[first.idx] if first.idx < len(taken) else str(first.idx))
            out.append(f"{where}{''.join(map(str, keys[2:]))}")
        return out


def _differences(key: tuple, other: tuple, names: Sequence[str]) -> dict[str, str]:
    """key, other: what `Keys.of` says of a call, and whether gradients are synchronised."""
    (call, sync), (before, was) = key, other
    out = {} if sync == was else {"no_sync": "is another"}
    out |= {what: "is another" for what, a, b in zip(WHATS[1:], call[1:], before[1:], strict=True) if a != b}
    if len(call[0]) != len(before[0]):
        return out or {WHATS[1]: "is another"}
    for name, a, b in zip(names, call[0], before[0], strict=False):
        if a != b:
            out[_noun(a, name)] = f"was {_text(b)}, is {_text(a)}"
    return out


def _noun(described: tuple, name: str) -> str:
    return f"{'argument' if len(described) == 2 else 'input'} {name}"


def _text(described: tuple) -> str:
    if len(described) == 2:
        return repr(described[1])
    shape, dtype, device, grad, placements = described
    text = f"{DTYPES.get(dtype, str(dtype))}{list(shape)} on {device}{', requires_grad' if grad else ''}"
    return f"{text}, {placements}" if placements else text
