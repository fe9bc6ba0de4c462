"""Optimizers in checkpoints: their state by the names of the parameters, laid out as the parameters are.

`optim.0.layers.0.weight.exp_avg` is of the first optimizer; `optim.0.groups` holds its groups. A train step's
optimizer is written as any other one, so each can be loaded into the other.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from shardc.compiler.errors import CheckpointError
from shardc.runtime.checkpoint.unpickle import plain

OPTIMIZER = "optim"
COUNT = "step"  # torch's name for how often a parameter was stepped on; it has the shape of a parameter without dims
Groups = list[dict[str, Any]]  # as in an optimizer, with names for params
State = dict[str, dict[str, Any]]  # by parameter


def is_optimizer_key(key: str) -> bool:
    return re.match(rf"{OPTIMIZER}\.\d+\.", key) is not None


def written(groups: Any, name: str) -> bytes:
    """Groups as one value, which can be read back without running anything. Raises CheckpointError for others."""
    stream = BytesIO()
    torch.save(groups, stream)
    try:
        _read(stream.getvalue())
    except pickle.UnpicklingError as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name} holds what is no plain value: {what}", help="leave it out of the groups"
        ) from error
    return stream.getvalue()


def _read(held: bytes) -> Any:
    """Earlier versions wrote a pickle."""
    return torch.load(BytesIO(held), weights_only=True) if held.startswith(b"PK") else plain(held)


class Held(Protocol):
    """An optimizer by the names of its parameters."""

    steps: int | None

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The parameters as they are laid out."""
        ...

    def optimizer_groups(self) -> Groups: ...
    def optimizer_state(self) -> State: ...
    def put_optimizer(self, state: State, groups: Groups, steps: Any) -> None: ...


@runtime_checkable
class Step(Held, Protocol):
    """What a train step has."""

    @property
    def module(self) -> nn.Module: ...


class Trained:
    """An optimizer of a checkpoint: the k-th."""

    def __init__(self, k: int, optimizer: Held) -> None:
        self.k, self.prefix, self.optimizer = k, f"{OPTIMIZER}.{k}.", optimizer
        self.groups = f"{self.prefix}groups"  # the key of its groups

    def room(self, entries: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Where its state is read to."""
        if self.groups not in entries:
            raise CheckpointError(f"{folder} holds no state of optimizer {self.k}", help="load the module alone")
        held, room = self.optimizer.held, {self.groups: b""}
        for key, (name, what) in self._names(entries).items():
            if name not in held:
                raise CheckpointError(
                    f"{key} in {folder} is of no parameter of optimizer {self.k}",
                    help="nothing was loaded; build it from the same parameters",
                )
            room[key] = _state_like(held[name], what, entries[key])
        return room

    def _names(self, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
        """The parameter, and what of its state, that each key of this optimizer is for."""
        mine = [key for key in keys if key.startswith(self.prefix) and key != self.groups]
        found = {key: key.removeprefix(self.prefix).rpartition(".") for key in mine}
        return {key: (name, what) for key, (name, _, what) in found.items()}

    def ready(self, staged: Mapping[str, Any], folder: Path) -> Callable[[], None]:
        """What puts the state in place, once all of it is known to fit."""
        try:
            saved = _read(staged[self.groups])
            groups, steps = saved["groups"], saved["steps"]
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(
                f"{self.groups} in {folder} cannot be read: {type(error).__name__}", help="nothing was loaded"
            ) from error
        state: State = {}
        for key, (name, what) in self._names(staged).items():
            state.setdefault(name, {})[what] = staged[key]
        here = self.optimizer.optimizer_groups()
        self._check_groups(groups, here, state, folder)
        merged = [{**there, "params": own["params"]} for there, own in zip(groups, here, strict=True)]
        steps = self.optimizer.steps if steps is None else steps
        return lambda: self.optimizer.put_optimizer(state, merged, steps)

    def _check_groups(self, there: Groups, here: Groups, state: State, folder: Path) -> None:
        """Groups have the same parameters, but for such as nothing is known of: those that do not train."""
        frozen = {name for name, p in self.optimizer.held.items() if not p.requires_grad and name not in state}
        known = {name for group in here for name in group["params"]}
        idle = frozen | {name for group in there for name in group["params"] if name not in known}
        kept = [[[n for n in g["params"] if n not in idle] for g in groups] for groups in (there, here)]
        if [set(names) for names in kept[0]] != [set(names) for names in kept[1]]:
            raise CheckpointError(
                f"optimizer {self.k} in {folder} has other groups of parameters",
                help="nothing was loaded; build it from the same parameters",
            )


class Alone:
    """An optimizer of the parameters of modules that are saved with it."""

    steps: int | None = None

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer, self._names = optimizer, names
        self.held = {self._name(p): p for group in optimizer.param_groups for p in group["params"]}

    def _name(self, p: Tensor) -> str:
        if id(p) not in self._names:
            raise CheckpointError("an optimizer has parameters of no module here", help="pass its module too")
        return self._names[id(p)]

    def optimizer_groups(self) -> Groups:
        return [{**g, "params": [self._name(p) for p in g["params"]]} for g in self._optimizer.param_groups]

    def optimizer_state(self) -> State:
        return {self._name(p): dict(values) for p, values in self._optimizer.state.items()}

    def put_optimizer(self, state: State, groups: Groups, steps: Any) -> None:
        index = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
        numbered = self._optimizer.state_dict()["param_groups"]
        given = [{**group, "params": own["params"]} for group, own in zip(groups, numbered, strict=True)]
        self._optimizer.load_state_dict({"state": {index[n]: x for n, x in state.items()}, "param_groups": given})


def _state_like(p: Tensor, what: str, entry: Any) -> Any:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if entry.size == p.shape and what != COUNT:
        return torch.empty_like(p.detach(), dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
