"""Checkpoints of models and optimizers through torch.distributed.checkpoint: any layout out, any layout in."""

# torch.distributed.checkpoint lists no names of its own:
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardc.compiler.errors import CheckpointError
from shardc.runtime.checkpoint.files import Writer, alone_is_meant, read_into, read_metadata
from shardc.runtime.checkpoint.optimizers import Alone, Step, Trained, is_optimizer_key, written
from shardc.runtime.checkpoint.safetensors_file import write_safetensors
from shardc.runtime.wire.distribute import as_runs, relaid, room_in_runs, whole


def save_checkpoint(path: str | os.PathLike[str], *objects: Any, background: bool = False) -> Future[Any] | None:
    """Write modules, optimizers of their parameters, and train steps into a folder. All ranks of a mesh call it.

    The keys are the modules' own FQNs. What stands in the folder stays loadable until the new checkpoint is whole.
    background: copy the values, return a Future, and write meanwhile; wait for its `result()` before the next save.

    Raises CheckpointError for other objects, for names that two modules share, and for an optimizer without its module.
    """
    folder, state = Path(path), _collect(*_sorted_out(objects))
    writer = Writer(folder, overwrite=True)
    if background:  # torch itself copies what lies on other devices alone
        state = {key: x.detach().clone() if isinstance(x, Tensor) else x for key, x in state.items()}
    if background and not dist.is_initialized():
        pool = ThreadPoolExecutor(1)
        try:
            return pool.submit(_save_alone, state, writer)
        finally:
            pool.shutdown(wait=False)
    if background:
        return dcp.async_save(state, storage_writer=writer, process_group=_side_group())  # pyright: ignore
    with alone_is_meant():
        dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    return None


def _save_alone(state: dict[str, Any], writer: dcp.FileSystemWriter) -> None:
    with alone_is_meant():
        dcp.save(state, storage_writer=writer, no_dist=True)


_SIDE: dict[Any, Any] = {}  # of each default group, one whose messages do not mix with those of training


def _side_group() -> Any:
    default = dist.group.WORLD
    if default not in _SIDE:
        _SIDE.clear()  # of a default group that was destroyed
        _SIDE[default] = dist.new_group(backend="gloo")
    return _SIDE[default]


def load_checkpoint(
    path: str | os.PathLike[str], *objects: Any, strict: bool = True, allow_pickle: bool = False
) -> None:
    """Read a folder of `save_checkpoint` into modules, optimizers and train steps of any layout. All ranks call it.

    strict: the names here and there must be the same; else what both have is loaded. Everything is read and checked
    before anything is changed. Files are data: tensors and plain values are built, nothing that they name is run.
    allow_pickle: whatever they name is, for files from hands that you trust.

    Raises CheckpointError that names files or keys where something is damaged or does not fit.
    """
    folder, (modules, trained) = Path(path), _sorted_out(objects)
    entries = read_metadata(folder, allow_pickle).state_dict_metadata
    wanted = {key: x for module in modules for key, x in module.state_dict().items()}
    if modules:
        _check_keys(folder, wanted, entries, strict)
    held: dict[str, Any] = {
        key: _like(module, key, x) for module in modules for key, x in module.state_dict().items() if key in entries
    }
    for one in trained:
        held |= one.room(entries, folder)
    staged = {key: room_in_runs(x) if isinstance(x, DTensor) else x for key, x in held.items()}
    read_into(staged, folder, allow_pickle=allow_pickle)
    staged = {key: relaid(x, held[key]) if isinstance(x, Tensor) else x for key, x in staged.items()}
    ready = [one.ready(staged, folder) for one in trained]  # these may still refuse
    for module in modules:
        module.load_state_dict({key: staged[key] for key in module.state_dict() if key in staged}, strict=False)
    for put in ready:
        put()


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


def _sorted_out(objects: Sequence[Any]) -> tuple[list[nn.Module], list[Trained]]:
    """(the modules, the optimizers), those of train steps included."""
    for x in objects:
        if not isinstance(x, (nn.Module, Optimizer, Step)):
            raise CheckpointError(
                f"a {type(x).__name__} is nothing to checkpoint",
                help="pass modules, optimizers of their parameters, and train steps",
            )
    modules = [x if isinstance(x, nn.Module) else x.module for x in objects if not isinstance(x, Optimizer)]
    seen: dict[str, None] = {}
    for module in modules:
        twice = next((key for key in module.state_dict() if key in seen), None)
        if twice is not None:
            raise CheckpointError(f"two modules have a {twice}", help="save them into folders of their own")
        seen |= dict.fromkeys(module.state_dict())
    named = {id(p): name for module in modules for name, p in module.named_parameters()}
    optimizers = [x for x in objects if not isinstance(x, nn.Module)]
    return modules, [Trained(k, Alone(x, named) if isinstance(x, Optimizer) else x) for k, x in enumerate(optimizers)]


def _collect(modules: Sequence[nn.Module], trained: Sequence[Trained]) -> dict[str, Any]:
    state = {key: x for module in modules for key, x in module.state_dict().items()}
    on_meta = [key for key, x in state.items() if isinstance(x, Tensor) and x.is_meta]
    if on_meta:
        raise CheckpointError(f"on meta, without values: {', '.join(on_meta)}", help="load them first")
    for one in trained:
        held = {"groups": one.optimizer.optimizer_groups(), "steps": one.optimizer.steps}
        state[one.groups] = written(held, one.groups)  # as one value
        for name, values in one.optimizer.optimizer_state().items():
            state |= {f"{one.prefix}{name}.{key}": x for key, x in values.items()}
    return {key: as_runs(x) if isinstance(x, DTensor) else x for key, x in state.items()}


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
        wrong += [f"{key}: not here" for key in entries if key not in wanted and not is_optimizer_key(key)]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit", excerpt="\n".join(wrong), help="nothing was loaded; strict=False skips names"
        )


def _like(module: nn.Module, key: str, x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_meta and isinstance(module, _Placed):
        return module.room_like(key)  # of a model that was compiled on meta, this rank's part alone
    return torch.empty_like(x, device="cpu") if x.is_meta else torch.empty_like(x)


@runtime_checkable
class _Placed(Protocol):
    def room_like(self, name: str) -> Tensor: ...
