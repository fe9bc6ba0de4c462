"""Whole values that one rank has reach all: one tensor at a time, of which each keeps its piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardc.compiler.errors import CheckpointError
from shardc.runtime.run.ranks import Ranks
from shardc.runtime.wire.distribute import broadcast

ABSENT, GIVEN, MISFIT, UNREADABLE = range(4)


@dataclass
class Spread:
    """Values for some tensors of a model. wanted: a tensor's names (several where it is tied) and the tensor, whose
    shape is the global one. source: whose values win; None: each rank has them all.

    Raises CheckpointError, on every rank alike, for values of another shape, and for names that nothing has.
    """

    wanted: Sequence[tuple[Sequence[str], Tensor]]
    known: Sequence[str]  # names that values may have
    ranks: Ranks | None
    source: int | None

    def look(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Find out which values there are. `read` is called on the source alone, or on every rank."""
        self.values: Mapping[str, Tensor] = {}
        states = [ABSENT] * (len(self.wanted) + 1)
        failure: Exception | None = None
        if self._reads:
            try:
                self.values = read()
                states = [*(self._state(names, x) for names, x in self.wanted), self._strangers()]
            except Exception as error:  # the others wait: they must hear of it
                failure, states[-1] = error, UNREADABLE
        self.states = self._everywhere(states)
        if failure is not None:
            raise failure
        self._check()

    @property
    def missing(self) -> list[str]:
        """Tensors without a value, by all their names."""
        absent = [names for (names, _), state in zip(self.wanted, self.states, strict=False) if state == ABSENT]
        return [name for names in absent for name in names]

    def whole(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """(names, whole values) of each tensor that has any; not to be written to."""
        for (names, x), state in zip(self.wanted, self.states, strict=False):
            if state == GIVEN:
                yield names, self._value(names, x)

    @property
    def _shared(self) -> bool:
        return self.ranks is not None and self.source is not None and self.ranks.mesh.size > 1

    @property
    def _reads(self) -> bool:
        return not self._shared or self.ranks is None or self.ranks.coords == self.ranks.mesh.coords(self.source or 0)

    def _state(self, names: Sequence[str], x: Tensor) -> int:
        shape_of = getattr(self.values, "shape_of", lambda name: self.values[name].shape)
        found = [shape_of(name) for name in names if name in self.values]
        if not found:
            return ABSENT
        return GIVEN if all(shape == x.shape for shape in found) else MISFIT

    def _strangers(self) -> int:
        return MISFIT if any(name not in self.known for name in self.values) else GIVEN

    def _check(self) -> None:
        if self.states[-1] == UNREADABLE:
            raise CheckpointError(f"rank {self.source} could not read the weights", help="its own error says why")
        misfits = [
            f"{names[0]} (here {tuple(x.shape)})"
            for (names, x), state in zip(self.wanted, self.states, strict=False)
            if state == MISFIT
        ]
        if misfits:
            raise CheckpointError(f"values of another shape: {', '.join(misfits)}", help="nothing was loaded")
        if self.states[-1] == MISFIT:
            strangers = [name for name in self.values if name not in self.known]
            what = ", ".join(strangers) or f"some of rank {self.source}'s"
            raise CheckpointError(f"the model has nothing of these names: {what}", help="nothing was loaded")

    def _everywhere(self, states: list[int]) -> list[int]:
        if not self._shared or self.ranks is None:
            return states
        sent = torch.tensor(states, dtype=torch.uint8, device=self.ranks.device_mesh.device_type)
        broadcast(sent, self.ranks.device_mesh, self.source or 0)
        return sent.tolist()

    def _value(self, names: Sequence[str], x: Tensor) -> Tensor:
        device = torch.device(self.ranks.device_mesh.device_type) if self.ranks is not None else torch.device("cpu")
        device = x.device if not x.is_meta else device
        if self._reads:
            value = next(self.values[name] for name in names if name in self.values)
            value = value.detach().to(device, x.dtype)
        else:
            value = torch.empty(x.shape, dtype=x.dtype, device=device)
        if self._shared and self.ranks is not None and value.numel():
            value = value.contiguous()
            broadcast(value, self.ranks.device_mesh, self.source or 0)
        return value
