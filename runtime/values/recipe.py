"""How tensors on meta come to their values: a list of operator calls, to be run later, for one tensor or for all.

Tensors are named by where their elements lie (`Ref`): a storage, and sizes, strides and an offset in it. So views
need no call of their own, and in-place writes are found again through whatever view they were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from shardc.compiler.errors import ShardingError
from shardc.compiler.user_code import call_site


class Ref(NamedTuple):
    """The elements of a recorded tensor."""

    storage: int  # index in Recipe.storages
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def covers(self, nbytes: int) -> bool:
        """Whether these elements, each counted once, are all of a storage."""
        dense = torch.empty(0, device="meta").new_empty_strided(self.size, self.stride).untyped_storage().nbytes() // 4
        count = 1
        for size in self.size:
            count *= size
        return count == dense and count * self.dtype.itemsize == nbytes


class Room(NamedTuple):
    """A storage that recorded tensors share."""

    nbytes: int
    device: torch.device


@dataclass(frozen=True)
class Step:
    """One recorded call. Recorded tensors stand in args and kwargs as Refs, real ones as copies.

    results: per tensor that it returns, its Ref. makes: storages that it creates. writes: operands it changes.
    pure: whether what it writes does not depend on what was there before. before: for a random call the state its
    generator starts from: that after the step of this number, or (below zero) a start of the recipe.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Ref | None, ...]
    makes: tuple[int, ...]
    writes: tuple[Ref, ...]
    pure: bool
    before: int | None
    where: str

    def operands(self) -> Iterator[Ref]:
        """Recorded tensors that it is given."""
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        return (x for x in leaves if isinstance(x, Ref))

    def reads(self) -> list[Ref]:
        """Those whose values matter: what is written purely counts only where it is an operand once more."""
        found = list(self.operands())
        for ref in self.writes if self.pure else ():
            found.remove(ref)
        return found


@dataclass
class Recipe:
    """All calls so far. `known`: recorded storages by identity; `alive` keeps them, so that none is mistaken."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where tensors on meta are to be
    steps: list[Step] = field(default_factory=list)
    storages: list[Room] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)  # states of generators
    touching: list[list[int]] = field(default_factory=list)  # per storage the steps that make or write it
    known: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    after: dict[int, Tensor] = field(default_factory=dict)  # random step, once made -> state of its generator then
    ends: list[tuple[torch.Generator, int]] = field(default_factory=list)  # generators, and where they would be
    names: dict[str, int] = field(default_factory=dict)  # what a deferred module left on meta -> its version then
    marks: dict[bytes, int] = field(default_factory=dict)  # what a generator was set to after a step -> the step
    waiting: set[int] = field(default_factory=set)  # storages that an init is to fill; others may stay as they come

    def __deepcopy__(self, memo: Any) -> Recipe:
        raise ShardingError("a module of deferred_init has no values to copy", help="call deferred_init once more")

    def __reduce__(self) -> Any:
        raise ShardingError("a module of deferred_init has no values to save", help="compile it first")

    def knows(self, x: Tensor) -> bool:
        return x.is_meta and x.untyped_storage()._cdata in self.known

    def waits(self, x: Tensor) -> bool:
        """Whether a tensor is one that an init is to fill, and nothing was written to yet."""
        storage = self.known.get(x.untyped_storage()._cdata)
        return storage in self.waiting and not self.touching[storage]

    def ref(self, x: Tensor, device: torch.device | None = None) -> Ref:
        """Of a tensor on meta; a storage met for the first time is one that nothing was written to."""
        storage = x.untyped_storage()
        index = self.known.get(storage._cdata)
        if index is None:
            index = self.known[storage._cdata] = len(self.storages)
            self.storages.append(Room(storage.nbytes(), device or self.device))
            self.touching.append([])
            self.alive.append(x.detach())
        return Ref(index, x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))

    def add(self, step: Step) -> None:
        for storage in dict.fromkeys([*step.makes, *(ref.storage for ref in step.writes)]):
            self.touching[storage].append(len(self.steps))
        self.steps.append(step)

    def text(self) -> str:
        """What must be equal on all ranks for them to make the same values."""
        starts = [hashlib.sha256(state.cpu().numpy().tobytes()).hexdigest()[:16] for state in self.starts]
        lines = [f"generator {start}" for start in starts]
        for step in self.steps:
            given = pytree.tree_map_only(Tensor, _digest, (step.args, step.kwargs))
            given = pytree.tree_map_only(torch.Generator, lambda g: "generator", given)
            lines.append(f"{step.call} {given} {step.before} {step.where}")
        return "\n".join(lines)

    def fills(self, step: Step, storage: int) -> bool:
        """Whether nothing of what a storage held before this step matters after it."""
        if storage in step.makes:
            return True
        room = self.storages[storage]
        return step.pure and any(w.storage == storage and w.covers(room.nbytes) for w in step.writes)

    def needed(self, wanted: Mapping[int, int]) -> list[int]:
        """The steps that make up the values of some storages: storage -> the step before which it is wanted."""
        found: set[int] = set()
        todo, seen = list(wanted.items()), set(wanted.items())
        while todo:
            storage, end = todo.pop()
            for i in reversed([i for i in self.touching[storage] if i < end]):
                if i not in found:
                    found.add(i)
                    more = {(ref.storage, i) for ref in self.steps[i].reads()} - seen
                    seen |= more
                    todo += more
                if self.fills(self.steps[i], storage):
                    break
        return sorted(found)


def _digest(x: Tensor) -> str:
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(x.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that random operators on a device draw from when they are given none."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[device.index if device.index is not None else module.current_device()]


def unreplayable(call: Any, why: str, where: str | None = None) -> ShardingError:
    """The error for a call that cannot be kept for later."""
    return ShardingError(
        f"{call} cannot be recorded: {why}",
        where=where or call_site(),
        help="build without deferred_init (and compile the real module), or take this call out of the constructor",
    )
