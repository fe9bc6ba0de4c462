"""The plan written on the modules: `replicate(module)` and `fully_shard(module)`, read by compile.

Annotations live beside the modules, not on them: nothing shows in `state_dict`, and a copy has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.entries import DataEntry, FullyShard, Replicated, check_megabytes
from shardc.compiler.plan.layout import bad_option, shown
from shardc.compiler.plan.match import did_you_mean
from shardc.compiler.user_code import call_site

Annotated = TypeVar("Annotated", bound=nn.Module)
DEFAULT_MESH_DIM = "dp"
# They tune how it finds and packs gradients; the compiled program needs no such help.
DDP_OPTIONS = tuple(inspect.signature(nn.parallel.DistributedDataParallel).parameters)[1:]
ELSEWHERE = {
    "mixed_precision": "use the option precision of compile",
    "process_group": "use the option mesh of compile",
    "device_mesh": "use the option mesh of compile",
    "device_ids": "use device_id",
    "output_device": "use device_id",
    "dim": "use the option inputs of compile",
}


@dataclass(frozen=True)
class Annotation:
    """What a module's owner wrote: the call, its entry and mesh dim, the line, and the device inputs are moved to."""

    call: str
    entry: DataEntry
    mesh_dim: str
    where: str
    device_id: int | torch.device | None = None

    def text(self, fqn: str) -> str:
        """The call as it would be written, with the module's name for the module."""
        return f'{self.call}("{fqn}")'


_annotations: WeakKeyDictionary[nn.Module, tuple[Annotation, ...]] = WeakKeyDictionary()


def replicate(
    module: Annotated,
    *,
    mesh_dim: str = DEFAULT_MESH_DIM,
    ignored_modules: str | nn.Module | Iterable[nn.Module | str] | None = None,
    device_id: int | torch.device | None = None,
    bucket_cap_mb: float = 25,
    **ddp_options: object,
) -> Annotated:
    """Marks a module as data parallel over a mesh dim, and returns it.

    ignored_modules: modules inside it, or patterns of their names in it, whose gradients stay local.
    device_id: where its inputs, positional and keyword, are moved to.
    bucket_cap_mb: gradients are reduced together in buckets of up to this many MiB.
    ddp_options: further options of DistributedDataParallel, accepted and without effect.

    Raises RuntimeError for a device_id that is no device, PlanError naming any other option that makes
    no sense, and PlanError for a module annotated before for this mesh dim.
    """
    if device_id is not None and (isinstance(device_id, bool) or not isinstance(device_id, (int, torch.device))):
        raise RuntimeError(f"Expected device_id to be int or torch.device, got {type(device_id).__name__}")
    check_megabytes(bucket_cap_mb, "bucket_cap_mb")
    for name, value in ddp_options.items():
        _check_ddp_option(name, value)
    entry = Replicated(ignored_modules=ignored_modules, bucket_mb=bucket_cap_mb)
    _annotate(module, "replicate", entry, mesh_dim, device_id)
    return module


def fully_shard(
    module: Annotated,
    *,
    mesh_dim: str = DEFAULT_MESH_DIM,
    reshard_after_forward: bool | int = True,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
    reduce_dtype: torch.dtype | None = None,
    ignored_params: str | nn.Parameter | Iterable[nn.Parameter | str] | None = None,
) -> Annotated:
    """Marks a module as one gather unit of fully sharded parameters over a mesh dim, and returns it.

    Options and errors are those of `FullyShard`; patterns in ignored_params are of names inside the
    module. Raises PlanError for a module annotated before for this mesh dim.
    """
    entry = FullyShard(
        reshard_after_forward=reshard_after_forward,
        placement=placement,
        reduce_dtype=reduce_dtype,
        ignored_params=ignored_params,
    )
    _annotate(module, "fully_shard", entry, mesh_dim, None)
    return module


def annotated(model: nn.Module) -> list[tuple[str, Annotation]]:
    """(FQN, annotation) of every annotated module of a model, each module once, in `named_modules` order."""
    return [(fqn, note) for fqn, m in model.named_modules() for note in _annotations.get(m, ())]


def annotate_alike(module: nn.Module, like: nn.Module) -> None:
    """Give a module that stands for another one its annotations."""
    if like in _annotations:
        _annotations[module] = _annotations[like]


def _annotate(
    module: nn.Module, call: str, entry: DataEntry, mesh_dim: object, device: int | torch.device | None
) -> None:
    if not isinstance(module, nn.Module):
        raise PlanError(f"module is {shown(module)}", help="annotate one nn.Module at a time")
    if not isinstance(mesh_dim, str):
        raise bad_option("mesh_dim", mesh_dim, "the name of a mesh dim")
    before = _annotations.get(module, ())
    for note in before:
        if note.mesh_dim == mesh_dim:
            raise PlanError(
                f"this {type(module).__name__} is annotated twice for the mesh dim {mesh_dim}",
                where=call_site(),
                help=f"leave out one of the two; the first is at {note.where}",
            )
    _annotations[module] = (*before, Annotation(call, entry, mesh_dim, call_site(), device))


def _check_ddp_option(name: str, value: object) -> None:
    if name in ELSEWHERE:
        raise PlanError(f"replicate has no option {name}", help=ELSEWHERE[name])
    if name not in DDP_OPTIONS:
        raise PlanError(f"replicate has no option {name}", help=did_you_mean(name, DDP_OPTIONS))
    if value is not None and not isinstance(value, bool):
        raise bad_option(name, value, "True or False")
