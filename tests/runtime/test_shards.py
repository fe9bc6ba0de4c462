"""Tensors cut and joined again, against index lists that know nothing of specs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from torch import Tensor

from shardc.compiler.ir.collectives import Cut, cut_of
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Part, Spec, axes_of, size_of
from shardc.runtime.shards import combine, cut, deal, join, undeal
from tests.build import parse
from tests.spec.test_spec import held, specs

MESH = Mesh(dp=2, tp=3)
SMALL = Mesh(a=2, b=2, c=3)


def pieces(x: Tensor, layout: Spec, mesh: Mesh) -> list[Tensor]:
    return [cut(x, layout, mesh, mesh.coords(rank)) for rank in range(mesh.size)]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def shaped(text: str) -> tuple[Tensor, Spec]:
    layout = parse(text, MESH)[1]
    return numbered(layout.shape), layout


# ---- cut


@given(specs(SMALL))
def test_a_rank_holds_the_indices_that_its_layout_says(layout: Spec):
    x = numbered(layout.shape)
    for rank in range(SMALL.size):
        coords = SMALL.coords(rank)
        expected = x
        for d, dim in enumerate(layout.dims):
            expected = expected.index_select(d, torch.tensor(held(dim, SMALL, coords), dtype=torch.int64))
        if any(op == "sum" and coords[axis] for axis, op in layout.pending):
            expected = torch.zeros_like(expected)
        assert torch.equal(cut(x, layout, SMALL, coords), expected)


def test_a_pending_sum_lies_on_the_first_rank():
    x, layout = shaped("[4]+tp")
    assert [p.any().item() for p in pieces(x, layout, MESH)] == [True, False, False, True, False, False]


def test_another_pending_value_lies_on_all():
    x, layout = shaped("[4]+max(tp)")
    assert all(torch.equal(p, x) for p in pieces(x, layout, MESH))


def test_a_whole_value_is_not_copied():
    x, layout = shaped("[4, 5]")
    assert cut(x, layout, MESH, MESH.coords(3)).data_ptr() == x.data_ptr()


# ---- join


@given(specs(SMALL))
def test_join_undoes_cut(layout: Spec):
    x = numbered(layout.shape)
    assert torch.equal(join(pieces(x, layout, SMALL), layout, SMALL), x)


@pytest.mark.parametrize("size", [5, 8, 1])
def test_join_undoes_cut_over_a_part_of_a_mesh_dim(size: int):
    mesh, x = Mesh(dp=4, tp=2), numbered((size, 4))
    layout = Spec.whole((size, 4)).split(0, "tp", mesh).split(0, "dp/2", mesh)
    assert str(layout) == f"[{size}@tp.dp/2, 4]"
    assert torch.equal(join(pieces(x, layout, mesh), layout, mesh), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("text", ["[7@tp, 4]", "[4, (3@dp 2)]", "[6@dp, 4]+tp", "[2@tp]", "[]+dp+tp"])
def test_join_undoes_cut_for_every_dtype(text: str, dtype: torch.dtype):
    x, layout = shaped(text)
    x = x.to(dtype)
    assert torch.equal(join(pieces(x, layout, MESH), layout, MESH), x)


def test_summands_are_added():
    layout = parse("[2]+tp", MESH)[1]
    given = [torch.full((2,), float(10**rank)) for rank in range(6)]
    assert join(given, layout, MESH).tolist() == [111.0, 111.0]  # the first replica's three


@pytest.mark.parametrize(("op", "expected"), [("max", 5), ("min", 0), ("prod", 0), ("sum", 15)])
def test_operands_are_reduced_over_all_pending_mesh_dims(op: str, expected: int):
    layout = Spec(((Part(1),),), (("dp", op), ("tp", op)))
    given = [torch.tensor([rank]) for rank in range(6)]
    assert join(given, layout, MESH).item() == expected


def test_reductions_that_differ_by_mesh_dim_are_each_done_along_their_own():
    layout = Spec(((Part(1),),), (("dp", "max"), ("tp", "sum")))
    given = [torch.tensor([n]) for n in (1, 2, 3, 10, 0, 0)]
    assert join(given, layout, MESH).item() == 10  # of the sums 6 and 10


# ---- combine


@pytest.mark.parametrize(("op", "expected"), [("sum", True), ("max", True), ("min", False), ("prod", False)])
def test_bools_reduce_as_any_and_all(op: str, expected: bool):
    assert combine(op, [torch.tensor(True), torch.tensor(False)]).item() is expected


def test_values_are_combined_in_rank_order():
    big, one = torch.tensor(2.0**53, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert combine("sum", [big, one, -big]).item() == 0.0
    assert combine("sum", [big, -big, one]).item() == 1.0


# ---- deal


@pytest.mark.parametrize("text", ["[7@tp, 4]", "[4, 5@tp]", "[(3@tp 2), 4]", "[4, (2 5@tp)]", "[8@dp.tp, 4]", "[2@tp]"])
def test_a_value_is_dealt_into_what_each_rank_of_a_group_holds(text: str):
    x, layout = shaped(text)
    dim = layout.dim_of("tp")
    assert dim is not None
    for rank in MESH.groups("dp")[0]:
        coords = MESH.coords(rank)
        mine = cut(x, layout.without("tp", MESH), MESH, coords)
        how = cut_of(layout, dim, "tp", MESH, coords, layout)
        dealt = deal(mine, how)
        for i, piece in enumerate(dealt):
            expected = cut(x, layout, MESH, {**coords, "tp": i})
            assert torch.equal(piece.reshape(expected.shape), expected)
        assert torch.equal(undeal([p.reshape(-1) for p in dealt], how).reshape(mine.shape), mine)


def test_a_cut_knows_the_shape_of_each_piece():
    how = Cut((2, 3, 7, 4), 2, (3, 3, 1))
    assert [how.piece_view(i) for i in range(3)] == [(2, 3, 3, 4), (2, 3, 3, 4), (2, 3, 1, 4)]


def test_cut_of_takes_the_sizes_of_other_dims_from_the_other_layout():
    split, others = parse("[7@tp, 6]", MESH)[1], parse("[7, 6@dp]", MESH)[1]
    assert cut_of(split, 0, "tp", MESH, MESH.coords(0), others) == Cut((7, 3), 0, (3, 3, 1))


@given(specs(SMALL))
def test_every_index_of_a_dim_is_held_and_by_one_place_along_the_mesh_dims_that_split_it(layout: Spec):
    for dim in layout.dims:
        places = {tuple(SMALL.coords(r)[a] for a in axes_of(dim)): held(dim, SMALL, SMALL.coords(r)) for r in range(12)}
        assert sorted(itertools.chain(*places.values())) == list(range(size_of(dim)))
