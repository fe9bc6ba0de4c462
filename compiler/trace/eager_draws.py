"""Runs a module eagerly with the random numbers that its program draws: what `verify` compares with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardc.compiler.rules.ops.random.distributions import DISTRIBUTIONS, SEED, Draw, like_of
from shardc.compiler.trace.torch_internals import TorchDispatchMode

aten = torch.ops.aten
IN_PLACE = {aten.bernoulli_.float: aten.bernoulli.p, aten.normal_.default: aten.normal_functional.default}


class NumberedDraws(TorchDispatchMode):
    """Random operators as rng="counter" draws them, numbered in the order in which they are met.

    What a checkpoint runs again is the same draw: each takes a number from the default generator, which the
    checkpoint puts back. What the program leaves to torch is drawn from where that generator stood at first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.get_rng_state()
        self._seeds: dict[torch.device, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._drawn: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        again = int(torch.randint(2**62, []))
        functional, in_place = _functional(func)
        found = None
        if functional in DISTRIBUTIONS:
            with torch.random.fork_rng(devices=[]):
                out = args[0] if in_place else functional(*args, **kwargs)
            found = self._number(functional, out if isinstance(out, Tensor) else out[0], again, args, kwargs)
        if found is None:
            if again not in self._drawn:
                self._drawn[again] = self._in_stream(lambda: func(*args, **kwargs))
            return self._drawn[again]
        return args[0].copy_(found) if in_place else found

    def _number(self, op: Any, out: Tensor, again: int, args: Any, kwargs: Any) -> Any:
        def seed() -> Tensor:
            if out.device not in self._seeds:
                self._seeds[out.device] = self._in_stream(lambda: SEED(out.device))
            return self._seeds[out.device]

        number = self._numbers.get(again, len(self._numbers))
        like = like_of(args, out.shape, lambda x: getattr(x, "shape", None))
        like = out if like is None else like
        draw = Draw(lambda op, *a, **k: op(*a, **k), like, seed, number, out.dtype)
        found = DISTRIBUTIONS[op](draw, *args, **kwargs)
        if found is not None:
            self._numbers[again] = number
        return found

    def _in_stream(self, fn: Callable[[], Any]) -> Any:
        """Draw from the program's generator, not from what tells checkpoints apart."""
        aside = torch.get_rng_state()
        torch.set_rng_state(self._generator)
        try:
            return fn()
        finally:
            self._generator = torch.get_rng_state()
            torch.set_rng_state(aside)


def _functional(func: Any) -> tuple[Any, bool]:
    """The operator that makes a new tensor of what this one writes in place, if it does."""
    name = func.overloadpacket.__name__
    if not name.endswith("_"):
        return func, False
    if func in IN_PLACE:
        return IN_PLACE[func], True
    return getattr(getattr(aten, name[:-1], None), func._overloadname, func), True
