"""Optimizers in checkpoints: their state by the names of the parameters, laid out as the parameters are.

`optim.0.layers.0.weight.exp_avg` is of the first optimizer; `optim.0.groups` holds its groups. A train step's
optimizer is written as any other one, so each can be loaded into the other.
"""

from __future__ import annotations

import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from shardc.compiler.errors import CheckpointError

OPTIMIZER = "optim"
Groups = list[dict[str, Any]]  # as in an optimizer, with names for params
State = dict[str, dict[str, Any]]  # by parameter


def is_optimizer_key(key: str) -> bool:
    return re.match(rf"{OPTIMIZER}\.\d+\.", key) is not None


@runtime_checkable
class Step(Protocol):
    """What a train step has."""

    steps: int

    @property
    def module(self) -> nn.Module: ...
    @property
    def held(self) -> Mapping[str, Tensor]: ...
    def optimizer_groups(self) -> Groups: ...
    def optimizer_state(self) -> State: ...
    def put_optimizer(self, state: State, groups: Groups, steps: int) -> None: ...


class Trained(ABC):
    """An optimizer and what its parameters are called."""

    def __init__(self, k: int) -> None:
        self.k, self.prefix = k, f"{OPTIMIZER}.{k}."

    @abstractmethod
    def held(self) -> Mapping[str, Tensor]:
        """Its parameters as they are laid out."""

    @abstractmethod
    def groups(self) -> Groups: ...

    @abstractmethod
    def state(self) -> State: ...

    @abstractmethod
    def steps(self) -> int | None: ...

    @abstractmethod
    def put(self, state: State, groups: Groups, steps: int | None) -> None: ...

    def room(self, entries: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Where its state is read to."""
        groups = f"{self.prefix}groups"
        if groups not in entries:
            raise CheckpointError(f"{folder} holds no state of optimizer {self.k}", help="load the module alone")
        room: dict[str, Any] = {groups: b""}
        for name, p in self.held().items():
            start = f"{self.prefix}{name}."
            for key, entry in entries.items():
                if key.startswith(start) and "." not in key[len(start) :]:
                    room[key] = _state_like(p, entry)
        stray = next((key for key in entries if key.startswith(self.prefix) and key not in room), None)
        if stray is not None:
            raise CheckpointError(
                f"{stray} in {folder} is of no parameter of optimizer {self.k}",
                help="nothing was loaded; build it from the same parameters",
            )
        return room

    def ready(self, staged: Mapping[str, Any], folder: Path) -> Callable[[], None]:
        """What puts the state in place, once all of it is known to fit."""
        try:
            saved = pickle.loads(staged[f"{self.prefix}groups"])
            groups, steps = saved["groups"], saved["steps"]
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(
                f"{self.prefix}groups in {folder} cannot be read: {type(error).__name__}", help="nothing was loaded"
            ) from error
        state: State = {}
        for name in self.held():
            start = f"{self.prefix}{name}."
            values = {
                key[len(start) :]: x
                for key, x in staged.items()
                if key.startswith(start) and "." not in key[len(start) :]
            }
            if values:
                state[name] = values
        here = self.groups()
        self._check_groups(groups, here, state, folder)
        merged = [{**there, "params": own["params"]} for there, own in zip(groups, here, strict=True)]
        return lambda: self.put(state, merged, steps)

    def _check_groups(self, there: Groups, here: Groups, state: State, folder: Path) -> None:
        """Groups have the same parameters, but for such as nothing is known of: those that do not train."""
        frozen = {name for name, p in self.held().items() if not p.requires_grad and name not in state}
        known = {name for group in here for name in group["params"]}
        idle = frozen | {name for group in there for name in group["params"] if name not in known}
        kept = [[[n for n in g["params"] if n not in idle] for g in groups] for groups in (there, here)]
        if [set(names) for names in kept[0]] != [set(names) for names in kept[1]]:
            raise CheckpointError(
                f"optimizer {self.k} in {folder} has other groups of parameters",
                help="nothing was loaded; build it from the same parameters",
            )


class Alone(Trained):
    """An optimizer of the parameters of modules that are saved with it."""

    def __init__(self, k: int, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        super().__init__(k)
        self._optimizer, self._names = optimizer, names
        self._held = {self._name(p): p for group in optimizer.param_groups for p in group["params"]}

    def _name(self, p: Tensor) -> str:
        if id(p) not in self._names:
            raise CheckpointError("an optimizer has parameters of no module here", help="pass its module too")
        return self._names[id(p)]

    def held(self) -> Mapping[str, Tensor]:
        return self._held

    def groups(self) -> Groups:
        return [{**g, "params": [self._name(p) for p in g["params"]]} for g in self._optimizer.param_groups]

    def state(self) -> State:
        return {self._name(p): dict(values) for p, values in self._optimizer.state.items()}

    def steps(self) -> int | None:
        return None

    def put(self, state: State, groups: Groups, steps: int | None) -> None:
        index = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
        numbered = self._optimizer.state_dict()["param_groups"]
        given = [{**group, "params": own["params"]} for group, own in zip(groups, numbered, strict=True)]
        self._optimizer.load_state_dict({"state": {index[n]: x for n, x in state.items()}, "param_groups": given})


class Stepped(Trained):
    """The optimizer of a train step."""

    def __init__(self, k: int, step: Step) -> None:
        super().__init__(k)
        self._step = step

    def held(self) -> Mapping[str, Tensor]:
        return self._step.held

    def groups(self) -> Groups:
        return self._step.optimizer_groups()

    def state(self) -> State:
        return self._step.optimizer_state()

    def steps(self) -> int | None:
        return self._step.steps

    def put(self, state: State, groups: Groups, steps: int | None) -> None:
        self._step.put_optimizer(state, groups, self._step.steps if steps is None else steps)


def _state_like(p: Tensor, entry: Any) -> Any:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if entry.size == p.shape and p.dim():
        return torch.empty_like(p.detach(), dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
