"""Checkpoints of models and optimizers through torch.distributed.checkpoint: any layout out, any layout in.

A save writes files of new names beside those of the last one, and switches by renaming `.metadata`, the one file
that says which belong together. So a save that is killed leaves the last checkpoint as it was.
"""

# torch.distributed.checkpoint lists no names of its own:
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardc.compiler.errors import CheckpointError
from shardc.runtime.safetensors_file import write_safetensors
from shardc.runtime.state import whole

OPTIMIZER = "optim"  # optim.0.layers.0.weight.exp_avg: of the first optimizer


def save_checkpoint(path: str | os.PathLike[str], *objects: Any, background: bool = False) -> Future[Any] | None:
    """Write modules, train steps and optimizers of modules' parameters into a folder. All ranks of a mesh call it.

    The keys are the modules' own FQNs. What stands in the folder stays loadable until the new checkpoint is whole.
    background: copy the values, return a Future, and write meanwhile; wait for its `result()` before the next save.

    Raises CheckpointError for other objects, for names that two modules share, and for an optimizer without its module.
    """
    folder, state = Path(path), _collect(_sorted_out(objects))
    writer = _Writer(folder, overwrite=True)
    if background and not dist.is_initialized():
        copied = {key: x.detach().clone() if isinstance(x, Tensor) else x for key, x in state.items()}
        pool = ThreadPoolExecutor(1)
        try:
            return pool.submit(_save_alone, copied, writer)
        finally:
            pool.shutdown(wait=False)
    if background:
        group = dist.new_group(backend="gloo")
        return dcp.async_save(state, storage_writer=writer, process_group=group)  # pyright: ignore
    with alone_is_meant():
        dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    return None


def _save_alone(state: dict[str, Any], writer: dcp.FileSystemWriter) -> None:
    with alone_is_meant():
        dcp.save(state, storage_writer=writer, no_dist=True)


def load_checkpoint(path: str | os.PathLike[str], *objects: Any, strict: bool = True) -> None:
    """Read a folder of `save_checkpoint` into modules, train steps and optimizers of any layout, a train step's into
    a module and its optimizer as well. All ranks of a mesh call it.

    strict: the names here and there must be the same; else what both have is loaded. Everything is read before
    anything is changed. Raises CheckpointError that names files or keys where something is damaged or does not fit.
    """
    folder, (modules, optimizers) = Path(path), _sorted_out(objects)
    entries = _metadata(folder).state_dict_metadata
    wanted = {key: x for module in modules for key, x in module.state_dict().items()}
    if modules:
        _check_keys(folder, wanted, entries, strict)
    staged: dict[str, Any] = {key: _like(x) for key, x in wanted.items() if key in entries}
    for k, optimizer in enumerate(optimizers):
        staged |= _optimizer_room(k, optimizer, modules, entries, folder)
    try:
        with alone_is_meant():
            dcp.load(staged, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as error:  # torch's own is no Exception
        raise CheckpointError(
            f"{folder} cannot be read: {_cause(error)}", help="nothing was loaded; take an older checkpoint"
        ) from error
    for module in modules:
        module.load_state_dict({key: staged[key] for key in module.state_dict() if key in staged}, strict=False)
    for k, optimizer in enumerate(optimizers):
        _put_optimizer(k, optimizer, modules, staged, folder)


def save_safetensors(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Write a module's whole state_dict into one file, under its own names. All ranks call it; the first one writes.

    Tensors are gathered one at a time. The file is replaced at once, when it is whole.
    """
    state = module.state_dict()
    values = (whole(x) for x in state.values())
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_safetensors(Path(path), state, values)
    else:
        for _ in values:
            pass
    if any(isinstance(x, DTensor) for x in state.values()):
        dist.barrier()


@contextmanager
def alone_is_meant() -> Iterator[None]:
    """Where there is no process group, torch says so at every save and load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Files(FileSystem):
    """Nothing is deleted before it is replaced: the writer finds no older checkpoint to delete."""

    def exists(self, path: str | os.PathLike) -> bool:
        return False


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = _Files()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        fresh = uuid4().hex[:12]
        made = super().prepare_global_plan(plans)
        return [replace(p, storage_data=replace(p.storage_data, prefix=f"__{fresh}_{i}_")) for i, p in enumerate(made)]

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        kept = {info.relative_path for info in (metadata.storage_data or {}).values()}
        for file in Path(self.path).glob("__*.distcp"):
            if file.name not in kept:
                file.unlink(missing_ok=True)


class StepLike(Protocol):
    """A train step, as it is saved: its module, and an optimizer of this rank's local tensors."""

    compiled: nn.Module
    optimizer: Optimizer
    steps: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_optimizer(self, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], steps: int) -> None: ...


Stepper = Optimizer | StepLike


def _is_step(x: Any) -> bool:
    return isinstance(getattr(x, "compiled", None), nn.Module) and isinstance(getattr(x, "optimizer", None), Optimizer)


def _sorted_out(objects: Sequence[Any]) -> tuple[list[nn.Module], list[Stepper]]:
    for x in objects:
        if not isinstance(x, (nn.Module, Optimizer)) and not _is_step(x):
            raise CheckpointError(
                f"a {type(x).__name__} is nothing to checkpoint",
                help="pass modules, train steps, and optimizers of the modules' parameters",
            )
    modules = [x.compiled if _is_step(x) else x for x in objects if not isinstance(x, Optimizer)]
    seen: dict[str, None] = {}
    for module in modules:
        twice = next((key for key in module.state_dict() if key in seen), None)
        if twice is not None:
            raise CheckpointError(f"two modules have a {twice}", help="save them into folders of their own")
        seen |= dict.fromkeys(module.state_dict())
    return modules, [x for x in objects if _is_step(x) or isinstance(x, Optimizer)]


def _names(modules: Sequence[nn.Module]) -> dict[int, str]:
    return {id(p): name for module in modules for name, p in module.named_parameters()}


def _name(p: Tensor, names: Mapping[int, str]) -> str:
    if id(p) not in names:
        raise CheckpointError("an optimizer has parameters of no module here", help="pass its module too")
    return names[id(p)]


def _collect(found: tuple[list[nn.Module], list[Stepper]]) -> dict[str, Any]:
    modules, optimizers = found
    state = {key: x for module in modules for key, x in module.state_dict().items()}
    on_meta = [key for key, x in state.items() if isinstance(x, Tensor) and x.is_meta]
    if on_meta:
        raise CheckpointError(f"on meta, without values: {', '.join(on_meta)}", help="load them first")
    names = _names(modules)
    for k, optimizer in enumerate(optimizers):
        state[f"{OPTIMIZER}.{k}.groups"] = pickle.dumps(_groups(optimizer, modules))  # as one value
        if not isinstance(optimizer, Optimizer):
            state[f"{OPTIMIZER}.{k}.steps"] = optimizer.steps
        for name, values in _state(optimizer, names).items():
            state |= {f"{OPTIMIZER}.{k}.{name}.{key}": x for key, x in values.items()}
    return state


def _state(optimizer: Stepper, names: Mapping[int, str]) -> Mapping[str, Mapping[str, Any]]:
    """What an optimizer holds of each parameter, by name, laid out as the parameter is."""
    if not isinstance(optimizer, Optimizer):
        return optimizer.state_dict()["optimizer"]
    return {_name(p, names): values for p, values in optimizer.state.items()}


def _groups(optimizer: Stepper, modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """The groups, with names for parameters. A train step's are of local tensors, in the order of its module's."""
    if isinstance(optimizer, Optimizer):
        names, groups = _names(modules), optimizer.param_groups
    else:
        local = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        owned = [name for name, _ in optimizer.compiled.named_parameters()]
        names, groups = {id(p): name for p, name in zip(local, owned, strict=True)}, optimizer.optimizer.param_groups
    return [{**group, "params": [_name(p, names) for p in group["params"]]} for group in groups]


def _metadata(folder: Path) -> Metadata:
    try:
        return dcp.FileSystemReader(folder).read_metadata()
    except (Exception, dcp.CheckpointException) as error:  # torch's own is no Exception
        raise CheckpointError(
            f"{folder / '.metadata'} cannot be read: {type(error).__name__}", help="is this the folder of a checkpoint?"
        ) from error


def _check_keys(folder: Path, wanted: Mapping[str, Any], entries: Mapping[str, Any], strict: bool) -> None:
    """Raises CheckpointError that lists every name that does not fit."""
    wrong = [
        f"{key}: {tuple(entries[key].size)} there, {tuple(x.shape)} here"
        for key, x in wanted.items()
        if isinstance(x, Tensor)
        and isinstance(entries.get(key), TensorStorageMetadata)
        and entries[key].size != x.shape
    ]
    if strict:
        wrong += [f"{key}: not there" for key in wanted if key not in entries]
        wrong += [f"{key}: not here" for key in entries if key not in wanted and not key.startswith(f"{OPTIMIZER}.")]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit", excerpt="\n".join(wrong), help="nothing was loaded; strict=False skips names"
        )


def _like(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_like(x, device="cpu") if x.is_meta else torch.empty_like(x)


def _optimizer_room(
    k: int, optimizer: Stepper, modules: Sequence[nn.Module], entries: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Where an optimizer's state is read to: laid out as its parameters are."""
    groups, steps = f"{OPTIMIZER}.{k}.groups", f"{OPTIMIZER}.{k}.steps"
    if groups not in entries:
        raise CheckpointError(f"{folder} holds no state of optimizer {k}", help="load the module alone")
    room: dict[str, Any] = {groups: b""} | ({steps: 0} if steps in entries else {})
    params = {name: p for module in modules for name, p in module.named_parameters()}
    for name in (name for group in _groups(optimizer, modules) for name in group["params"]):
        prefix = f"{OPTIMIZER}.{k}.{name}."
        for key, entry in entries.items():
            if key.startswith(prefix) and "." not in key[len(prefix) :]:
                room[key] = _state_like(params[name], entry)
    return room


def _state_like(p: Tensor, entry: Any) -> Any:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if entry.size == p.shape and p.dim():
        return torch.empty_like(p.detach(), dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _put_optimizer(
    k: int, optimizer: Stepper, modules: Sequence[nn.Module], staged: Mapping[str, Any], folder: Path
) -> None:
    saved: list[dict[str, Any]] = pickle.loads(staged[f"{OPTIMIZER}.{k}.groups"])
    here = [group["params"] for group in _groups(optimizer, modules)]
    if [group["params"] for group in saved] != here:
        raise CheckpointError(
            f"optimizer {k} in {folder} has other groups of parameters", help="build it from the same parameters"
        )
    state: dict[str, dict[str, Any]] = {}
    for name in (name for group in here for name in group):
        prefix = f"{OPTIMIZER}.{k}.{name}."
        if values := {key[len(prefix) :]: x for key, x in staged.items() if key.startswith(prefix)}:
            state[name] = values
    if not isinstance(optimizer, Optimizer):
        groups = [{key: x for key, x in group.items() if key != "params"} for group in saved]
        optimizer.load_optimizer(state, groups, staged.get(f"{OPTIMIZER}.{k}.steps", 0))
        return
    place = {name: i for i, name in enumerate(name for group in here for name in group)}
    numbered = optimizer.state_dict()["param_groups"]
    groups = [{**group, "params": own["params"]} for group, own in zip(saved, numbered, strict=True)]
    optimizer.load_state_dict({"state": {place[n]: v for n, v in state.items()}, "param_groups": groups})


def _cause(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"
