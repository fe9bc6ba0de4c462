"""Parameters as a rank holds them: whole tensors dealt out as shards, shards joined again, values loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec, from_placements, to_placements
from shardc.runtime.shards import cut, put


def broadcast(x: Tensor, device_mesh: DeviceMesh, source: int) -> None:
    """Give every rank of the mesh the tensor of the rank at position `source`: one mesh dim after the other.

    As bytes, since backends do not take every dtype, nor every layout in memory.
    """
    packed = x.detach().contiguous()
    flat = packed.reshape(-1).view(torch.uint8)
    at = Mesh.of(device_mesh).coords(source)
    for i, coordinate in enumerate(at.values()):
        group = device_mesh.get_group(i)
        if dist.get_world_size(group) > 1:
            dist.broadcast(flat, group_src=coordinate, group=group)
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        x.data = packed  # an expanded tensor has no place for elements of its own
    elif packed.data_ptr() != x.data_ptr():
        x.data.copy_(packed)


def shard(whole: Tensor, spec: Spec, device_mesh: DeviceMesh, coords: Mapping[str, int]) -> Tensor:
    """This rank's piece of a whole parameter or buffer, as a DTensor of its kind and global shape."""
    local = cut(whole.detach(), spec, Mesh.of(device_mesh), coords).clone(memory_format=torch.contiguous_format)
    held = as_dtensor(local, spec, device_mesh)
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(held, requires_grad=whole.requires_grad)
    return held.requires_grad_(whole.requires_grad)


def as_dtensor(local: Tensor, spec: Spec, device_mesh: DeviceMesh) -> DTensor:
    """A local piece under its global label. Raises ValueError for a layout that torch has no placements for."""
    placements = to_placements(spec, Mesh.of(device_mesh))
    if placements is None:
        raise ValueError(f"torch has no placements for {spec}")
    stride = torch.empty(spec.shape, device="meta").stride()
    shape = torch.Size(spec.shape)
    return DTensor.from_local(local, device_mesh, placements, run_check=False, shape=shape, stride=stride)


def local_of(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def as_held(value: Tensor, held: Tensor, spec: Spec, device_mesh: DeviceMesh, coords: Mapping[str, int]) -> Tensor:
    """A loaded value in the layout a parameter is held in: a whole tensor is cut, a DTensor re-laid."""
    if not isinstance(held, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor):
        return relaid(value, held)
    if value.shape != held.shape:
        return value  # nn.Module's own message about shapes is the right one
    return as_dtensor(cut(value, spec, Mesh.of(device_mesh), coords).contiguous(), spec, device_mesh)


def gather_whole(local: Tensor, spec: Spec, device_mesh: DeviceMesh, coords: Mapping[str, int]) -> Tensor:
    """The global tensor of which every rank passes its piece, on every rank."""
    mesh = Mesh.of(device_mesh)
    out = local.new_zeros(spec.shape)
    if not any(coords[a] for a in mesh.names if a not in spec.axes()):
        put(out, local, spec, mesh, coords)  # of equal pieces one rank's is enough
    for axis in mesh.names:
        if mesh[axis] > 1:
            dist.all_reduce(out, group=device_mesh.get_group(axis))
    return out


def whole(x: Tensor) -> Tensor:
    """The global tensor, on every rank; a collective where x is a DTensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- runs: what torch's checkpoints can name is one box of indices per rank, and not three of a fused q, k, v


def in_runs(x: DTensor) -> bool:
    """Whether each rank's piece is one box of indices, by placements that say so plainly."""
    return all(isinstance(p, (Shard, Replicate)) for p in x.placements)


def _spec_of(x: DTensor) -> Spec:
    mesh = Mesh.of(x.device_mesh)
    return from_placements(x.shape, dict(zip(mesh.names, x.placements, strict=True)), mesh)


def _spec_in_runs(x: DTensor) -> Spec:
    mesh, split = Mesh.of(x.device_mesh), _spec_of(x)
    spec = Spec.whole(x.shape)
    for axis in mesh.names:
        d = split.dim_of(axis)
        spec = spec if d is None else spec.split(d, axis, mesh)
    return spec


def _coords(x: DTensor) -> Mapping[str, int]:
    here = x.device_mesh.get_coordinate()
    assert here is not None
    return dict(zip(Mesh.of(x.device_mesh).names, here, strict=True))


def as_runs(x: DTensor) -> DTensor:
    """The same value split over the same mesh dims in one box per rank. All ranks call it."""
    if in_runs(x):
        return x
    spec, mesh, coords = _spec_in_runs(x), Mesh.of(x.device_mesh), _coords(x)
    joined = gather_whole(x.to_local(), _spec_of(x), x.device_mesh, coords)
    return as_dtensor(cut(joined, spec, mesh, coords).clone(), spec, x.device_mesh)


def room_in_runs(x: DTensor) -> Tensor:
    """Memory for `as_runs` of a value laid out as x."""
    if in_runs(x):
        return cast(DTensor, torch.empty_like(x))
    spec, mesh = _spec_in_runs(x), Mesh.of(x.device_mesh)
    local = torch.empty(spec.local_shape(mesh, _coords(x)), dtype=x.dtype, device=x.to_local().device)
    return as_dtensor(local, spec, x.device_mesh)


def relaid(value: Tensor, like: Tensor) -> Tensor:
    """A DTensor in the layout of another one of its shape. All ranks call it."""
    if not isinstance(value, DTensor) or not isinstance(like, DTensor) or value.placements == like.placements:
        return value
    if in_runs(like) and in_runs(value):
        return value.redistribute(like.device_mesh, like.placements)
    joined = gather_whole(value.to_local(), _spec_of(value), value.device_mesh, _coords(value))
    spec, mesh = _spec_of(like), Mesh.of(like.device_mesh)
    return as_dtensor(cut(joined, spec, mesh, _coords(like)).contiguous(), spec, like.device_mesh)
