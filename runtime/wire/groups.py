"""Mesh dims become process groups: who this rank is in a DeviceMesh, and which mesh applies by default."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from shardc.compiler.errors import PlanError
from shardc.compiler.spec.mesh import Mesh

TIMEOUT = timedelta(minutes=10)  # of a process group that we initialise: what torch gives nccl


class Groups(Mapping[str, dist.ProcessGroup]):
    """The process group of this rank along each mesh dim, and this rank's place in the mesh.

    mesh: the integers; coords: by mesh dim; position: the rank's number within the mesh; ranks: the global
    ranks of all positions. Raises PlanError where this process is outside the mesh, or where the ranks along
    a mesh dim do not ascend: torch numbers the members of a process group in that order.
    """

    def __init__(self, device_mesh: DeviceMesh) -> None:
        self.mesh = Mesh.of(device_mesh)
        self.device_type = device_mesh.device_type
        self.ranks: tuple[int, ...] = tuple(device_mesh.mesh.flatten().tolist())
        place = device_mesh.get_coordinate()
        if place is None:
            raise PlanError(
                f"rank {dist.get_rank()} is outside the mesh, which has ranks {_text(self.ranks)}",
                help="compile only on the ranks of the mesh",
            )
        self.coords = dict(zip(self.mesh.names, place, strict=True))
        self.position = self.mesh.rank(self.coords)
        self._groups = {name: device_mesh.get_group(i) for i, name in enumerate(self.mesh.names)}
        for name, group in self._groups.items():
            along = [self.ranks[p] for p in self.mesh.group(name, self.position)]
            members = dist.get_process_group_ranks(group)
            if along != members:
                raise PlanError(
                    f"mesh dim {name} has ranks {_text(along)}, its process group {_text(members)}",
                    help="give DeviceMesh the ranks of each mesh dim in ascending order",
                )

    def __getitem__(self, name: str) -> dist.ProcessGroup:
        """Of a part of a mesh dim too, for which all ranks of the mesh ask, in one order."""
        if name not in self._groups and self.mesh.dim_of(name) in self.mesh:
            members = [self.ranks[p] for p in self.mesh.group(name, self.position)]
            group = dist.new_group(members, use_local_synchronization=True, group_desc=f"shardc {name}")
            assert isinstance(group, dist.ProcessGroup)
            self._groups[name] = group
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def default_device_mesh(names: Sequence[str] = ()) -> DeviceMesh | None:
    """The mesh of a call that names none: the enclosing `with device_mesh:`; else one mesh dim over all ranks
    of the process group, initialised from torchrun's environment where need be; else None, one rank.

    names: the plan's mesh dims. Raises PlanError where there are several and nothing says their sizes.
    """
    enclosing = _enclosing_mesh()
    if enclosing is not None:
        return enclosing
    if len(names) > 1:
        listed = ", ".join(f'"{name}"' for name in names)
        sizes = ", ".join("?" for _ in names)
        raise PlanError(
            f"the plan has mesh dims {', '.join(names)} and there is no mesh to say their sizes",
            help=f'mesh=init_device_mesh("{_device_type()}", ({sizes}), mesh_dim_names=({listed}))',
        )
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            return None
        _join_torchrun()
    return init_device_mesh(_device_type(), (dist.get_world_size(),), mesh_dim_names=tuple(names) or None)


def _enclosing_mesh() -> DeviceMesh | None:
    # A DTensor made without a mesh gets the enclosing one: torch has no more direct public way to ask for it.
    with torch.no_grad():
        try:
            return DTensor.from_local(torch.empty((), device="meta"), run_check=False).device_mesh
        except RuntimeError:  # there is none
            return None


def _device_type() -> str:
    """The accelerator where the process group has a backend of its own for it, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not dist.is_initialized():
        return "cpu" if accelerator is None else accelerator.type
    backends = dict(part.split(":") for part in dist.get_backend_config().split(","))
    return accelerator.type if backends.get(accelerator.type, "gloo") != "gloo" else "cpu"


def _join_torchrun() -> None:
    """Initialise the process group: nccl if every rank says it has a GPU of its own, else gloo."""
    store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.cuda.is_available() and dist.is_nccl_available() and local < torch.cuda.device_count()
    gpus = PrefixStore("shardc/gpus", store)
    gpus.set(str(rank), str(int(own)))
    everyone = [str(r) for r in range(world)]
    gpus.wait(everyone, TIMEOUT)
    backend = "nccl" if all(gpus.get(r) == b"1" for r in everyone) else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local)
    groups = PrefixStore("shardc/groups", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=world, timeout=TIMEOUT)


def _text(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
