"""Layouts against a model that knows nothing of them: for every rank, the list of indices it holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import (
    DTYPES,
    Dim,
    Part,
    Spec,
    axes_of,
    canonical,
    from_placements,
    regroup,
    restrict,
    shard_dim,
    size_of,
    to_placements,
)
from tests.build import parse

MESH = Mesh(dp=2, tp=4)
SMALL = Mesh(a=2, b=2, c=3)


# ---- the model: index lists, made with torch.chunk and products alone


def held(dim: Sequence[Part], mesh: Mesh, coords: dict[str, int]) -> list[int]:
    """Global indices of a dim that the rank at `coords` holds, in the order in which it holds them."""
    digits = []
    for size, axes in dim:
        piece = torch.arange(size)
        for axis in axes:
            pieces = [*piece.chunk(mesh[axis]), *[piece[:0]] * mesh[axis]]
            piece = pieces[coords[axis]]
        digits.append(piece.tolist())
    sizes = [size for size, _ in dim]
    return [sum(d * math.prod(sizes[k + 1 :]) for k, d in enumerate(point)) for point in itertools.product(*digits)]


def everywhere(dim: Sequence[Part], mesh: Mesh) -> list[list[int]]:
    return [held(dim, mesh, mesh.coords(rank)) for rank in range(mesh.size)]


def dims(mesh: Mesh, largest: int = 6, parts: int = 3) -> st.SearchStrategy[Dim]:
    """Any dim, canonical or not: up to three parts, each mesh dim on one of them or on none."""

    def deal(sizes: list[int], order: list[str], places: list[int]) -> Dim:
        used = list(zip(order, places, strict=True))
        return tuple(Part(n, tuple(a for a, p in used if p == k)) for k, n in enumerate(sizes))

    sizes = st.lists(st.integers(1, largest), min_size=1, max_size=parts)
    order = st.permutations(list(mesh.names))
    places = st.lists(st.integers(0, parts), min_size=len(mesh.names), max_size=len(mesh.names))
    return st.builds(deal, sizes, order, places)


def respelled(dim: Dim) -> st.SearchStrategy[Dim]:
    """The same size in other parts, the same mesh dims on any of them."""

    @st.composite
    def draw(d: st.DrawFn) -> Dim:
        rest, sizes = size_of(dim), []
        while rest > 1:
            sizes.append(d(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
            rest //= sizes[-1]
        sizes = sizes or [1]
        places = [d(st.integers(0, len(sizes) - 1)) for _ in axes_of(dim)]
        used = list(zip(axes_of(dim), places, strict=True))
        return tuple(Part(n, tuple(a for a, p in used if p == k)) for k, n in enumerate(sizes))

    return draw()


def no_row_is_split(dim: Dim) -> bool:
    """Every mesh dim finds more than one row to split; a single row goes to a first rank in many spellings."""
    return all(not p.axes or p.size > math.prod(SMALL[a] for a in p.axes[:-1]) for p in dim)


def specs(mesh: Mesh) -> st.SearchStrategy[Spec]:
    """Any canonical spec of one to three dims, its mesh dims dealt to dims, pending sums or nothing."""

    @st.composite
    def draw(d: st.DrawFn) -> Spec:
        rank = d(st.integers(1, 3))
        free, pending, made = list(d(st.permutations(list(mesh.names)))), {}, []
        for _ in range(rank):
            parts = []
            for _ in range(d(st.integers(1, 2))):
                count = d(st.integers(0, len(free)))
                parts.append(Part(d(st.integers(1, 6)), tuple(free[:count])))
                free = free[count:]
            made.append(canonical(tuple(parts), mesh))
        for axis in free:
            if d(st.booleans()):
                pending[axis] = d(st.sampled_from(["sum", "max"]))
        return Spec(tuple(made)).with_pending(pending, mesh)

    return draw()


# ---- text


@pytest.mark.parametrize(
    "text",
    [
        "f32[]",
        "f32[8@dp, 32@tp]",
        "f32[64@dp.tp]",
        "f32[64@tp.dp, 1]",
        "bf16[(3@tp 16), 64]+dp",
        "f32[(3 8@tp), 64]",
        "f64[7]+max(dp)+tp",
        "i64[0@tp, 4]",
        "b8[5@tp]",
        "[4, 4@dp]",
        "float8_e4m3fn[4]",
    ],
)
def test_text_reads_back_as_the_same_layout(text: str):
    dtype, layout = parse(text, MESH)
    assert layout.text(dtype) == text


@given(specs(SMALL), st.sampled_from([*DTYPES, torch.float8_e5m2]))
def test_every_layout_reads_back_from_its_text(layout: Spec, dtype: torch.dtype):
    assert parse(layout.text(dtype), SMALL) == (dtype, layout)


@pytest.mark.parametrize("text", ["f32", "f32[8@dp", "f32[8@nope]", "f32[8]+nope", "f32[8]+dp("])
def test_text_that_is_no_type_is_refused(text: str):
    with pytest.raises((ValueError, KeyError)):
        parse(text, MESH)


# ---- canonical forms


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([Part(3, ("tp",)), Part(4)], "(3@tp 4)"),  # 1, 1, 1, 0 heads: no plain split does that
        ([Part(4, ("tp",)), Part(4)], "16@tp"),  # heads as many as ranks
        ([Part(2, ("dp",)), Part(8, ("tp",))], "16@dp.tp"),
        ([Part(4, ("tp",)), Part(4, ("dp",))], "16@tp.dp"),
        ([Part(3), Part(8, ("tp",))], "(3 8@tp)"),
        ([Part(1), Part(8, ("tp",))], "8@tp"),
        ([Part(8, ("tp",)), Part(1)], "8@tp"),
        ([Part(2), Part(3), Part(4)], "24"),
        ([Part(2), Part(2), Part(4, ("tp",))], "(4 4@tp)"),
        ([Part(6, ("tp",)), Part(2)], "(3@tp 4)"),  # 2, 2, 2, 0 pairs are 1, 1, 1, 0 fours
        ([Part(1, ("tp",)), Part(5)], "(1@tp 5)"),  # all of it on the first rank
        ([Part(1, ("tp",))], "1@tp"),
        ([Part(5, ("tp",)), Part(2)], "(5@tp 2)"),
        ([Part(0, ("tp",))], "0@tp"),
    ],
)
def test_one_canonical_form(parts: list[Part], text: str):
    assert Spec((canonical(tuple(parts), MESH),)).text() == f"[{text}]"


@given(dims(SMALL))
def test_the_canonical_form_holds_the_same_indices(dim: Dim):
    assert everywhere(canonical(dim, SMALL), SMALL) == everywhere(dim, SMALL)


@given(dims(SMALL))
def test_the_canonical_form_is_its_own(dim: Dim):
    once = canonical(dim, SMALL)
    assert canonical(once, SMALL) == once and sorted(axes_of(once)) == sorted(axes_of(dim))


@given(dims(SMALL))
def test_what_a_plain_split_says_is_written_plainly(dim: Dim):
    assume(no_row_is_split(dim))
    for axes in itertools.permutations(axes_of(dim)):
        plain = (Part(size_of(dim), axes),)
        if everywhere(plain, SMALL) == everywhere(dim, SMALL):
            assert len(canonical(dim, SMALL)) == 1


@given(dims(SMALL, largest=4), st.data())
def test_layouts_that_hold_the_same_are_written_the_same(dim: Dim, data: st.DataObject):
    other = data.draw(respelled(dim))
    assume(no_row_is_split((*dim, *other)))
    if everywhere(dim, SMALL) == everywhere(other, SMALL):
        assert canonical(dim, SMALL) == canonical(other, SMALL)


@given(dims(SMALL))
def test_the_local_size_is_the_number_of_indices_held(dim: Dim):
    layout = Spec((canonical(dim, SMALL),))
    for rank in range(SMALL.size):
        coords = SMALL.coords(rank)
        assert layout.local_shape(SMALL, coords) == (len(held(dim, SMALL, coords)),)


@given(dims(SMALL), st.sets(st.sampled_from(["a", "b", "c"])))
def test_restricting_leaves_the_other_splits(dim: Dim, keep: set[str]):
    dim = canonical(dim, SMALL)
    bare = [Part(p.size, tuple(a for a in p.axes if a in keep)) for p in dim]
    assert everywhere(restrict(dim, keep, SMALL), SMALL) == everywhere(bare, SMALL)


# ---- regroup


@pytest.mark.parametrize(
    ("dim", "sizes", "expected"),
    [
        ("16@tp", (4, 4), "[4@tp, 4]"),
        ("16@dp.tp", (2, 8), "[2@dp, 8@tp]"),
        ("16@tp", (2, 8), None),  # the four pieces cross the border of the two
        ("(3@tp 4)", (3, 4), "[3@tp, 4]"),
        ("(3 8@tp)", (3, 8), "[3, 8@tp]"),
        ("(3 8@tp)", (3, 4, 2), "[3, 4@tp, 2]"),
        ("(3 8@tp)", (24,), "[(3 8@tp)]"),
        ("12", (3, 4), "[3, 4]"),
        ("12@tp", (1, 12), "[1, 12@tp]"),
        ("12@tp", (12, 1), "[12@tp, 1]"),
        ("8@dp", (4, 2), "[4@dp, 2]"),
        ("6@dp", (4, 2), None),
        ("10@tp", (5, 2), None),  # 3, 3, 3, 1 is not whole pairs
        ("0", (0, 3), "[0, 3]"),
        ("0@tp", (0, 3), None),
        ("1@tp", (1, 1), "[1@tp, 1]"),
    ],
)
def test_a_dim_as_several(dim: str, sizes: tuple[int, ...], expected: str | None):
    groups = regroup(parse(f"[{dim}]", MESH)[1].dims[0], sizes, MESH)
    assert (None if groups is None else Spec(groups).text()) == expected


@given(dims(SMALL), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_regrouped_dims_hold_what_the_one_dim_held(dim: Dim, sizes: list[int]):
    dim = canonical((*dim, *(Part(n) for n in sizes)), SMALL)
    for parts in (tuple(p.size for p in dim), (size_of(dim),), (*(sizes[:1]), size_of(dim) // sizes[0])):
        groups = regroup(dim, parts, SMALL)
        if groups is not None:
            assert tuple(size_of(g) for g in groups) == parts
            assert everywhere([p for g in groups for p in g], SMALL) == everywhere(dim, SMALL)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_what_several_dims_say_is_found_again_in_the_one(sizes: list[int], data: st.DataObject):
    order = data.draw(st.permutations(["a", "b"]))
    places = data.draw(st.lists(st.integers(0, len(sizes)), min_size=2, max_size=2))
    apart = tuple(Part(n, tuple(a for a, p in zip(order, places, strict=True) if p == k)) for k, n in enumerate(sizes))
    groups = regroup(canonical(apart, SMALL), tuple(sizes), SMALL)
    assert groups is not None
    assert everywhere([p for g in groups for p in g], SMALL) == everywhere(apart, SMALL)


# ---- one mesh dim added or taken away


def test_split_goes_innermost():
    assert parse("[8@tp]", MESH)[1].split(0, "dp", MESH).text() == "[8@tp.dp]"


def test_split_of_a_compound_dim_takes_its_first_free_part():
    assert parse("[(3@tp 16)]", MESH)[1].split(0, "dp", MESH).text() == "[(3@tp 16@dp)]"


def test_without_leaves_the_other_mesh_dims():
    layout = parse("[16@dp.tp, 4]", MESH)[1]
    assert layout.without("dp", MESH).text() == "[16@tp, 4]"
    assert parse("[4]+dp+tp", MESH)[1].without("dp", MESH).text() == "[4]+tp"


def test_like_follows_the_part_that_another_layout_splits():
    whole, heads = Spec.whole((12, 8)), parse("[(3@tp 4), 8]", MESH)[1]
    assert whole.like(heads, 0, "tp", MESH) == heads


def test_like_splits_plainly_where_the_other_layout_does_not_fit():
    mine, other = parse("[(3@dp 4)]", MESH)[1], parse("[12@dp.tp]", MESH)[1]
    assert mine.like(other, 0, "tp", MESH) == mine.split(0, "tp", MESH)


@pytest.mark.parametrize(
    ("before", "placement", "open_split", "after"),
    [
        ("[8, 12]", Shard(1), False, "[8, 12@tp]"),
        ("[8, 12]", Shard(-1), False, "[8, 12@tp]"),
        ("[8, 12]", _StridedShard(1, split_factor=3), False, "[8, (3 4@tp)]"),
        ("[8@tp, 12]", Shard(1), False, "[8, 12@tp]"),
        ("[8@tp, 12]", Replicate(), False, "[8, 12]"),
        ("[8, 12]+tp", Replicate(), False, "[8, 12]"),
        ("[8, 12]", Partial(), False, "[8, 12]+tp"),
        ("[8, 12]+max(tp)", Partial(), False, "[8, 12]+tp"),
        ("[8, (3@tp 4)]", Shard(1), True, "[8, (3@tp 4)]"),  # open: any split of that dim will do
        ("[8, (3@tp 4)]", Shard(1), False, "[8, 12@tp]"),
        ("[8@dp, 12]", Shard(0), False, "[8@dp.tp, 12]"),
    ],
)
def test_place(before: str, placement: object, open_split: bool, after: str):
    assert parse(before, MESH)[1].place("tp", placement, MESH, open_split).text() == after  # pyright: ignore


@given(specs(SMALL), st.sampled_from(["a", "b", "c"]))
def test_placing_what_is_there_changes_nothing(layout: Spec, axis: str):
    if (at := layout.dim_of(axis)) is not None:
        assert layout.place(axis, Shard(at), SMALL, open=True) == layout
    elif op := layout.reduction(axis):
        assert layout.place(axis, Partial(op), SMALL) == layout
    else:
        assert layout.place(axis, Replicate(), SMALL) == layout


@given(specs(SMALL), st.sampled_from(["a", "b", "c"]))
def test_a_mesh_dim_added_is_the_one_that_without_takes_away(layout: Spec, axis: str):
    bare = layout.without(axis, SMALL)
    assert axis not in bare.axes() and bare.reduction(axis) is None
    for i in range(len(bare.dims)):
        split = bare.split(i, axis, SMALL)
        assert split.dim_of(axis) == i
        if any(part.axes[-1:] == (axis,) for part in split.dims[i]):
            assert split.without(axis, SMALL) == bare
    if (at := layout.dim_of(axis)) is not None:
        assert bare.like(layout, at, axis, SMALL).dim_of(axis) == at


# ---- torch's placements


def dealt(n: int, placements: Sequence[object], mesh: Mesh, coords: dict[str, int]) -> list[int]:
    """What torch's own placements deal of range(n) to a rank: mesh dims in order, each dealing what is left."""
    piece = torch.arange(n)
    for axis, placement in zip(mesh.names, placements, strict=True):
        if isinstance(placement, (Shard, _StridedShard)):
            pieces, _ = placement._split_tensor(piece, mesh[axis], with_padding=False)
            piece = pieces[coords[axis]]
    return piece.tolist()


def dealt_everywhere(n: int, placements: Sequence[object], mesh: Mesh) -> list[list[int]]:
    return [dealt(n, placements, mesh, mesh.coords(rank)) for rank in range(mesh.size)]


@given(dims(SMALL))
def test_placements_deal_as_the_layout_says(dim: Dim):
    layout = Spec((canonical(dim, SMALL),))
    placements = to_placements(layout, SMALL)
    assume(placements is not None)
    assert placements is not None
    assert dealt_everywhere(size_of(dim), placements, SMALL) == everywhere(dim, SMALL)


@given(specs(SMALL))
def test_placements_convert_back(layout: Spec):
    placements = to_placements(layout, SMALL)
    assume(placements is not None and all(len(axes_of(d)) < 3 for d in layout.dims))
    assert placements is not None
    assert from_placements(layout.shape, dict(zip(SMALL.names, placements, strict=True)), SMALL) == layout


placed = st.one_of(
    st.just(Replicate()),
    st.just(Shard(0)),
    st.builds(lambda f: _StridedShard(0, split_factor=f), st.integers(2, 4)),
)


@given(st.sampled_from([0, 1, 5, 12, 24, 36]), st.tuples(placed, placed, placed))
def test_a_layout_deals_as_its_placements_do_or_is_refused(n: int, placements: tuple):
    try:
        layout = from_placements((n,), dict(zip(SMALL.names, placements, strict=True)), SMALL)
    except ValueError:
        return
    assert everywhere(layout.dims[0], SMALL) == dealt_everywhere(n, placements, SMALL)


@pytest.mark.parametrize("n", [0, 1, 3, 12, 13])
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_plain_shards_of_any_size_are_torchs(n: int, ways: int):
    mesh = Mesh(tp=ways)
    layout = from_placements((n,), {"tp": Shard(0)}, mesh)
    assert everywhere(layout.dims[0], mesh) == dealt_everywhere(n, (Shard(0),), mesh)
    assert to_placements(layout, mesh) == (Shard(0),)


@pytest.mark.parametrize(
    ("text", "placements"),
    [
        ("[16@dp.tp, 4]", (Shard(0), Shard(0))),
        ("[16@tp.dp, 4]", (_StridedShard(0, split_factor=4), Shard(0))),
        ("[(3 8@tp), 4]+dp", (Partial(), _StridedShard(0, split_factor=3))),
        ("[4]+max(tp)", (Replicate(), Partial("max"))),
        ("[(3@tp 16)]", None),  # whole heads, unevenly: torch has no such placement
        ("[(3 8@dp.tp)]", None),
        ("[17@tp.dp]", None),
    ],
)
def test_to_placements(text: str, placements: tuple | None):
    assert to_placements(parse(text, MESH)[1], MESH) == placements


def test_mesh_dims_left_out_are_replicated():
    assert from_placements((8, 4), {"tp": Shard(1)}, MESH).text() == "[8, 4@tp]"


def test_mesh_dims_nest_in_the_order_given():
    assert from_placements((16,), {"tp": Shard(0), "dp": Shard(0)}, MESH).text() == "[16@tp.dp]"


@pytest.mark.parametrize("placement", [Shard(2), Shard(-3), _StridedShard(2, split_factor=2)])
def test_a_dim_that_the_tensor_lacks_is_refused(placement: object):
    with pytest.raises(ValueError, match="does not fit a tensor of 2 dims"):
        shard_dim(placement, 2)  # pyright: ignore


@pytest.mark.parametrize(("n", "first"), [(9, Replicate()), (12, Shard(0))])
def test_a_strided_shard_that_does_not_fit_is_refused(n: int, first: object):
    placements = {"dp": first, "tp": _StridedShard(0, split_factor=2)}
    with pytest.raises(ValueError, match="does not fit a dim of layout"):
        from_placements((n,), placements, MESH)  # pyright: ignore


def test_a_plain_shard_of_what_a_strided_one_left_is_refused_where_it_would_cut_the_strides():
    placements = {"dp": _StridedShard(0, split_factor=3), "tp": Shard(0)}
    with pytest.raises(ValueError, match="does not fit a dim of layout"):
        from_placements((24,), placements, MESH)
