"""Gradients that unsynchronised steps leave pending, until a synchronised one takes them in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from shardc.compiler.spec import Spec


class Kept:
    """Gradients left pending at unsynchronised steps, by parameter, with their layouts."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._specs: dict[str, Spec] = {}
        self._due: dict[str, None] = {}  # whose unsynchronised forward has run, and perhaps not its backward

    def declare(self, name: str, spec: Spec) -> None:
        """In which layout the program at hand leaves a parameter's gradient."""
        self._specs[name] = spec

    def expect(self, names: Iterable[str]) -> None:
        self._due |= dict.fromkeys(names)

    def keep(self, name: str, gradient: Tensor) -> None:
        self._tensors[name] = self._tensors[name] + gradient if name in self._tensors else gradient

    def take(self, name: str) -> Tensor | None:
        self._due.pop(name, None)
        return self._tensors.pop(name, None)

    def clear(self) -> None:
        """Forget what was kept, as `zero_grad` does to what is in `.grad`."""
        self._tensors.clear()
        self._due.clear()

    def layouts(self) -> tuple[tuple[str, Spec], ...]:
        """Those that the next synchronised backward must take in, in the order in which programs declared them."""
        return tuple((name, spec) for name, spec in self._specs.items() if name in self._tensors or name in self._due)
