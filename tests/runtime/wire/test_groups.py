"""A DeviceMesh as groups and coordinates, and the mesh of a call that names none."""

import os

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardc.compiler.errors import PlanError
from shardc.compiler.spec.mesh import Mesh
from shardc.runtime.launch.launch import launch
from shardc.runtime.wire.groups import Groups, default_device_mesh
from tests.runtime.ranks import LIMIT, on_ranks, run_ranks

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def refusal(mesh: DeviceMesh) -> str:
    try:
        Groups(mesh)
    except PlanError as error:
        return str(error)
    return ""


def look_at_meshes(rank: int) -> dict:
    """Asserts what holds on every rank; returns what differs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    groups = Groups(mesh)
    assert groups.mesh == Mesh(dp=2, tp=2) and groups.ranks == (0, 1, 2, 3)
    assert groups.coords == groups.mesh.coords(rank) and groups.position == rank
    assert list(groups) == ["dp", "tp"] and len(groups) == 2
    members = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    assert members == {name: list(groups.mesh.group(name, rank)) for name in groups}

    assert Groups(mesh["tp"]).mesh == Mesh(tp=2)
    assert Groups(init_device_mesh("cpu", (1, 4))).mesh == Mesh(dim_0=1, dim_1=4)
    odd = DeviceMesh("cpu", [1, 3], mesh_dim_names=("tp",))
    descending = DeviceMesh("cpu", [[1, 0], [3, 2]], mesh_dim_names=("dp", "tp"))
    return {
        "odd": refusal(odd) or (Groups(odd).coords, Groups(odd).ranks, Groups(odd).position),
        "descending": refusal(descending),
        "defaults": look_at_defaults(mesh),
    }


def look_at_defaults(mesh: DeviceMesh) -> str:
    with mesh:
        assert default_device_mesh(("anything", "else")) is mesh
        with mesh["tp"] as inner:
            assert default_device_mesh() is inner
    made = default_device_mesh(("fsdp",))
    assert made is not None and made.device_type == "cpu"
    assert Mesh.of(made) == Mesh(fsdp=4)
    unnamed = default_device_mesh()
    assert unnamed is not None and Mesh.of(unnamed) == Mesh(dim_0=4)
    try:
        default_device_mesh(("dp", "tp"))
    except PlanError as error:
        return str(error)
    return ""


@on_ranks
def test_meshes_of_real_ranks():
    told = run_ranks(look_at_meshes, 4)
    assert [t["odd"] for t in told[1::2]] == [({"tp": 0}, (1, 3), 0), ({"tp": 1}, (1, 3), 1)]
    assert told[0]["odd"].startswith("plan error: rank 0 is outside the mesh, which has ranks 1, 3\n")
    assert told[2]["descending"].splitlines() == [
        "plan error: mesh dim tp has ranks 3, 2, its process group 2, 3",
        "   = help: give DeviceMesh the ranks of each mesh dim in ascending order",
    ]
    assert told[0]["defaults"].splitlines() == [
        "plan error: the plan has mesh dims dp, tp and there is no mesh to say their sizes",
        '   = help: mesh=init_device_mesh("cpu", (?, ?), mesh_dim_names=("dp", "tp"))',
    ]


def join_by_default(rank: int) -> tuple:
    mesh = default_device_mesh(("tp",))
    assert mesh is not None
    return Mesh.of(mesh).shape, dist.get_backend(), Groups(mesh).coords["tp"], mesh.device_type


@on_ranks
def test_ranks_started_by_torchrun_are_joined():
    found = launch(join_by_default, 2, timeout=LIMIT, process_group=False)
    assert found == [((2,), "gloo", 0, "cpu"), ((2,), "gloo", 1, "cpu")]


def test_one_rank_where_nothing_is_distributed(monkeypatch: pytest.MonkeyPatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert default_device_mesh(("tp",)) is None
    assert not dist.is_initialized() and "RANK" not in os.environ
    with pytest.raises(PlanError, match="the plan has mesh dims dp, tp and there is no mesh"):
        default_device_mesh(("dp", "tp"))
