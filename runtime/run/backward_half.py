"""The backward half of a program, for whatever of its tangents there are: each choice is made when it is first met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.ir.fewer_tangents import without
from shardc.compiler.ir.graph import placeholders

Run = Callable[[list[Any]], list[Any]]  # of all that a half takes; the list is used up
Missing = tuple[int, ...]  # positions of what comes late and is not there


class BackwardHalf:
    """half: symbolic, its last `late` inputs being tangents, and gradients kept back. ready: makes it one that runs.
    zeros: a value of an input. meet: given what is missing, what goes around each run; ranks must miss the same."""

    def __init__(
        self,
        half: GraphModule,
        late: int,
        ready: Callable[[GraphModule], Run],
        zeros: Callable[[Node], Any],
        meet: Callable[[Missing], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._half, self._late, self._ready, self._zeros, self._meet = half, late, ready, zeros, meet
        inputs = placeholders(half)
        self.given = inputs[len(inputs) - late :]  # what comes late, in order
        self._made: dict[Missing, tuple[Run, list[int] | None]] = {(): (ready(half), None)}

    def __call__(self, saved: list[Any], late: Sequence[Any]) -> list[Any]:
        """What the half returns. late: values, or None for those that there are not. `saved` is used up."""
        missing = tuple(i for i, x in enumerate(late) if x is None)
        with self._meet(missing):
            return self._run(missing, saved, late)

    def _run(self, missing: Missing, saved: list[Any], late: Sequence[Any]) -> list[Any]:
        run, takes = self._made.get(missing) or self._make(missing)
        values = [*saved, *late]
        saved.clear()
        if takes is not None:
            inputs = placeholders(self._half)
            values = [self._zeros(inputs[i]) if values[i] is None else values[i] for i in takes]
        return run(values)

    def _make(self, missing: Missing) -> tuple[Run, list[int]]:
        first = len(placeholders(self._half)) - self._late
        fewer, takes = without(self._half, self._late, [first + i for i in missing])
        self._made[missing] = self._ready(fewer), takes
        return self._made[missing]  # pyright: ignore[reportReturnType]
