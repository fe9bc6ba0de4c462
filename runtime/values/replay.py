"""Makes what a recipe describes: some tensors, for real, with the draws they would have had among all the others.

Only the calls that a tensor's values depend on are made, and in their order; what a later call overwrites is left
out. A random call starts from the generator's state after the random call before it, which is therefore made too
(once, and dropped if nothing else needs it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from shardc.compiler.errors import ShardingError
from shardc.runtime.values.recipe import Recipe, Ref, Room, Step, generator_of


@dataclass
class _Memory:
    """A storage made for real, and which of its elements were written: all, or those of a mask."""

    storage: torch.UntypedStorage
    mask: Tensor | None = None
    full: bool = False

    def view(self, ref: Ref) -> Tensor:
        empty = torch.empty(0, dtype=ref.dtype, device=self.storage.device)
        return empty.set_(self.storage, ref.offset, ref.size, ref.stride)

    def holds(self, ref: Ref) -> bool:
        if self.full or 0 in ref.size:
            return True
        return self.mask is not None and self.mask.dtype.itemsize == 1 and bool(self._marks(ref).all())

    def written(self, ref: Ref) -> None:
        if self.full or ref.covers(self.storage.nbytes()):
            self.full, self.mask = True, None
            return
        if self.mask is None:
            self.mask = torch.zeros(self.storage.nbytes(), dtype=torch.bool)
        self._marks(ref).fill_(True)
        self.full = bool(self.mask.all())

    def _marks(self, ref: Ref) -> Tensor:
        assert self.mask is not None
        width = ref.dtype.itemsize
        return self.mask.as_strided((*ref.size, width), (*(s * width for s in ref.stride), 1), ref.offset * width)


class Replay:
    """Values of a recipe, which remembers the state of generators after each random step that was made."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self._after = recipe, recipe.after

    def value(self, ref: Ref) -> Tensor:
        """One recorded tensor, as it is at the end. Raises ShardingError where it was not given values."""
        (memory,) = self.storages([ref.storage])
        if not memory.holds(ref):
            raise ShardingError("a value is used that nothing was written to", help="fill it before it is read")
        return memory.view(ref)

    def storages(self, wanted: Sequence[int]) -> list[_Memory]:
        """Some storages, as they are at the end."""
        end = len(self.recipe.steps)
        rooms = self._run(self.recipe.needed(dict.fromkeys(wanted, end)), wanted)
        return [rooms.get(s) or self._room(self.recipe.storages[s]) for s in wanted]

    def last_draw(self, storage: int) -> int:
        """The last random step that a storage's values depend on; -1 where there is none."""
        needed = self.recipe.needed({storage: len(self.recipe.steps)})
        return max((i for i in needed if self.recipe.steps[i].before is not None), default=-1)

    def state(self, place: int) -> Tensor:
        """The state of a generator after a random step, or a start of the recipe."""
        chain, k = [], place
        while k >= 0 and k not in self._after:
            chain.append(k)
            before = self.recipe.steps[k].before
            assert before is not None
            k = before
        for k in reversed(chain):
            if k not in self._after:
                reads = {ref.storage: k for ref in self.recipe.steps[k].reads()}
                self._run([*self.recipe.needed(reads), k], ())
        return self._after[place] if place >= 0 else self.recipe.starts[-1 - place]

    def _run(self, indices: Sequence[int], keep: Iterable[int]) -> dict[int, _Memory]:
        """Make some steps, and keep some of the storages that they make or write."""
        memory: dict[int, _Memory] = {}
        last = {s: i for i in indices for s in _storages(self.recipe.steps[i])}
        kept = set(keep)
        for i in indices:
            step = self.recipe.steps[i]
            self._step(i, step, memory)
            for s in _storages(step):
                if last[s] == i and s not in kept:
                    memory.pop(s, None)
        return memory

    def _step(self, i: int, step: Step, memory: dict[int, _Memory]) -> None:
        for ref in step.operands():
            if ref.storage not in memory:
                memory[ref.storage] = self._room(self.recipe.storages[ref.storage])
        for ref in step.reads():
            if not memory[ref.storage].holds(ref):
                raise ShardingError(
                    f"{step.call} reads memory that nothing was written to", where=step.where,
                    help="fill the tensor before it is read",
                )  # fmt: skip

        def real(leaf: Any) -> Any:
            return memory[leaf.storage].view(leaf) if isinstance(leaf, Ref) else leaf

        args, kwargs = pytree.tree_map(real, (step.args, step.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = self.recipe.device
        with torch.no_grad():
            out = self._draw(i, step, args, kwargs) if step.before is not None else step.call(*args, **kwargs)
        for ref in step.writes:
            memory[ref.storage].written(ref)
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for x, ref in zip(made, step.results, strict=True):
            if ref is not None and ref.storage in step.makes:
                memory[ref.storage] = self._adopt(x, ref)

    def _draw(self, i: int, step: Step, args: Any, kwargs: Any) -> Any:
        assert step.before is not None
        state = self.state(step.before)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Generator)]
        if given:
            generator = torch.Generator(given[0].device)
            args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: generator, (args, kwargs))
        else:
            generator = generator_of(self._device(step))
        own = generator.get_state()
        try:
            generator.set_state(state)
            out = step.call(*args, **kwargs)
            self._after[i] = generator.get_state()
        finally:
            generator.set_state(own)
        return out

    def _device(self, step: Step) -> torch.device:
        refs = [*step.operands(), *(r for r in step.results if r is not None)]
        return self.recipe.storages[refs[0].storage].device

    def _adopt(self, x: Tensor, ref: Ref) -> _Memory:
        """What a step returned, in the place that it was recorded to have."""
        room = self.recipe.storages[ref.storage]
        same = x.stride() == ref.stride and x.storage_offset() == ref.offset
        if same and x.untyped_storage().nbytes() == room.nbytes:
            return _Memory(x.untyped_storage(), full=True)
        memory = self._room(room)
        memory.view(ref).copy_(x)
        memory.full = True
        return memory

    @staticmethod
    def _room(room: Room) -> _Memory:
        return _Memory(torch.empty(room.nbytes, dtype=torch.uint8, device=room.device).untyped_storage())


def _storages(step: Step) -> dict[int, None]:
    return dict.fromkeys([*(ref.storage for ref in step.operands()), *step.makes])
