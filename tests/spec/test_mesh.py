"""A mesh as integers: coordinates, ranks, groups."""

import pytest

from shardc.compiler.errors import PlanError
from shardc.compiler.spec.mesh import Mesh, part_of, place

MESH = Mesh(dp=2, cp=3, tp=4)


def test_ranks_count_with_the_last_mesh_dim_fastest():
    assert MESH.coords(0) == {"dp": 0, "cp": 0, "tp": 0}
    assert MESH.coords(5) == {"dp": 0, "cp": 1, "tp": 1}
    assert MESH.coords(23) == {"dp": 1, "cp": 2, "tp": 3}


def test_rank_undoes_coords():
    assert [MESH.rank(MESH.coords(rank)) for rank in range(MESH.size)] == list(range(24))


def test_a_group_differs_in_one_coordinate_only():
    assert MESH.group("tp", 6) == (4, 5, 6, 7)
    assert MESH.group("cp", 6) == (2, 6, 10)
    assert MESH.group("dp", 6) == (6, 18)


@pytest.mark.parametrize("name", MESH.names)
def test_groups_deal_every_rank_once(name: str):
    groups = MESH.groups(name)
    assert sorted(rank for group in groups for rank in group) == list(range(24))
    assert all(MESH.group(name, rank) == group for group in groups for rank in group)


def test_a_part_of_a_mesh_dim_is_its_consecutive_ranks():
    mesh = Mesh(dp=4, tp=2)
    assert (mesh["dp/2"], mesh.dim_of("dp/2"), mesh.dim_of("tp")) == (2, "dp", "tp")
    assert mesh.groups("dp/2") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert [mesh.group("dp/2", rank) for rank in (0, 3, 7)] == [(0, 2), (1, 3), (5, 7)]
    assert [place(mesh.coords(rank), "dp/2") for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert part_of("dp", 2) == "dp/2" and "dp/2" not in mesh


def test_a_part_of_no_mesh_dim_is_a_key_error():
    with pytest.raises(KeyError):
        MESH["pp/2"]


def test_names_shape_and_size():
    assert (MESH.names, MESH.shape, MESH.size, MESH["cp"]) == (("dp", "cp", "tp"), (2, 3, 4), 24, 3)
    assert list(MESH) == ["dp", "cp", "tp"]
    assert "tp" in MESH and "pp" not in MESH


def test_an_unknown_mesh_dim_is_a_key_error():
    with pytest.raises(KeyError):
        MESH["pp"]


def test_order_is_part_of_a_mesh():
    assert Mesh(a=2, b=2) == Mesh(a=2, b=2)
    assert hash(Mesh(a=2, b=2)) == hash(Mesh(a=2, b=2))
    assert Mesh(a=2, b=2) != Mesh(b=2, a=2)
    assert Mesh(a=2) != "mesh a=2"


def test_text():
    assert str(MESH) == "mesh dp=2 cp=3 tp=4"
    assert repr(MESH) == "Mesh(dp=2, cp=3, tp=4)"


def test_a_mesh_without_dims_is_one_rank():
    mesh = Mesh()
    assert (mesh.size, mesh.coords(0), mesh.rank({})) == (1, {}, 0)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2", None])
def test_a_size_that_is_no_positive_integer_is_refused(size: object):
    with pytest.raises(PlanError, match="mesh dim tp has size"):
        Mesh(tp=size)  # pyright: ignore[reportArgumentType]


class Grid:
    """What Mesh reads of a torch DeviceMesh."""

    def __init__(self, shape: tuple[int, ...], names: tuple[str, ...] | None) -> None:
        self.shape, self.mesh_dim_names, self.ndim = shape, names, len(shape)


def test_a_device_mesh_gives_its_names_and_sizes():
    assert Mesh.of(Grid((2, 4), ("dp", "tp"))) == Mesh(dp=2, tp=4)  # pyright: ignore[reportArgumentType]


def test_mesh_dims_without_names_are_numbered():
    assert Mesh.of(Grid((2, 4), None)) == Mesh(dim_0=2, dim_1=4)  # pyright: ignore[reportArgumentType]


def test_a_mesh_is_taken_as_it_is():
    assert Mesh.of(MESH) is MESH
