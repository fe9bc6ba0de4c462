"""Gradients that unsynchronised steps leave pending, until a synchronised one takes them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from shardc.compiler.errors import ShardingError
from shardc.compiler.spec.spec import Spec


class Sync(NamedTuple):
    """What a program does about gradients: `keep` names the parameters whose gradients it leaves pending over
    data-parallel mesh dims, `carries` those kept back before, in their layouts, that it takes in."""

    keep: tuple[str, ...] = ()
    carries: tuple[tuple[str, Spec], ...] = ()


ALL = Sync()  # every gradient is reduced


class Kept:
    """Gradients left pending at unsynchronised steps, by parameter, with their layouts."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._specs: dict[str, Spec] = {}
        self._due: dict[str, None] = {}  # whose unsynchronised forward has run, and perhaps not its backward

    def expect(self, specs: Mapping[str, Spec]) -> None:
        """A backward that keeps these is to come. Raises ShardingError where one is kept in another layout."""
        for name, spec in specs.items():
            if (name in self._tensors or name in self._due) and self._specs[name] != spec:
                raise ShardingError(
                    f"the gradient of {name} is kept back as {self._specs[name]}, and would now be as {spec}",
                    help="run a synchronised backward in between, outside of no_sync()",
                )
        self._specs |= specs
        self._due |= dict.fromkeys(specs)

    def keep(self, name: str, gradient: Tensor | None) -> None:
        """None: a loss did not depend on the parameter."""
        if gradient is not None:
            self._tensors[name] = self._tensors[name] + gradient if name in self._tensors else gradient
        self._due.pop(name, None)

    def take(self, name: str) -> Tensor | None:
        self._due.pop(name, None)
        return self._tensors.pop(name, None)

    def clear(self) -> None:
        """Forget what was kept, as `zero_grad` does to what is in `.grad`."""
        self._tensors.clear()
        self._due.clear()

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """What an error within leaves half done is forgotten: what was kept before is kept after it."""
        before = dict(self._tensors), dict(self._specs), dict(self._due)
        try:
            yield
        except BaseException:
            self._tensors, self._specs, self._due = before
            raise

    def layouts(self) -> tuple[tuple[str, Spec], ...]:
        """Those that the next synchronised backward must take in, by name: the same order on every rank."""
        held = sorted(name for name in self._specs if name in self._tensors or name in self._due)
        return tuple((name, self._specs[name]) for name in held)
