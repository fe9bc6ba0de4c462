"""The cheapest way between two layouts, and that it arrives with the right values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule

from shardc.compiler.ir import collectives
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Part, Spec, canonical
from shardc.compiler.spec.ways import Move, ways
from tests.build import parse, simulated
from tests.spec.test_spec import specs

MESH = Mesh(dp=2, tp=4)
SMALL = Mesh(a=2, b=2, c=3)


def way(source: str, target: str, mesh: Mesh = MESH, itemsize: int = 4) -> list[str]:
    moves = ways(parse(source, mesh)[1], parse(target, mesh)[1], itemsize, mesh)
    return [f"{m.kind}({', '.join(map(str, m.args))})" for m in moves]


# ---- one mesh dim


@pytest.mark.parametrize("n", [12, 13, 14])
@pytest.mark.parametrize(
    ("source", "target", "moves"),
    [
        ("[{n}@tp, 8]", "[{n}, 8]", ["all_gather(0, tp)"]),
        ("[{n}, 8]+tp", "[{n}, 8]", ["all_reduce(tp, sum)"]),
        ("[{n}, 8]+tp", "[{n}@tp, 8]", ["reduce_scatter(0, tp, sum)"]),
        ("[{n}, 8]", "[{n}@tp, 8]", ["local_slice(0, tp)"]),
        ("[{n}, 8]", "[{n}, 8]+tp", ["make_partial(tp)"]),
        ("[{n}@tp, 8]", "[{n}, 8@tp]", ["all_to_all(0, 1, tp)"]),
        ("[{n}, 8]+max(tp)", "[{n}@tp, 8]", ["reduce_scatter(0, tp, max)"]),
        ("[{n}, 8]+max(tp)", "[{n}, 8]", ["all_reduce(tp, max)"]),
        ("[{n}, 8]", "[{n}, 8]", []),
    ],
)
def test_one_move_does_it(source: str, target: str, moves: list[str], n: int):
    assert way(source.format(n=n), target.format(n=n)) == moves


@pytest.mark.parametrize("itemsize", [2, 4, 8, 16])
def test_the_way_does_not_depend_on_the_dtype_where_one_move_does_it(itemsize: int):
    assert way("[12@tp, 8]", "[12, 8@tp]", itemsize=itemsize) == ["all_to_all(0, 1, tp)"]


def test_another_factor_of_the_same_dim_goes_by_way_of_the_whole():
    assert way("[12@tp]", "[(3@tp 4)]") == ["all_gather(0, tp)", "local_slice(0, tp)"]


def test_a_pending_sum_reaches_whole_heads_in_one_move():
    assert way("[12]+tp", "[(3@tp 4)]") == ["reduce_scatter(0, tp, sum)"]


def test_from_one_reduction_to_another_the_first_is_done():
    assert way("[12]+max(tp)", "[12]+tp") == ["all_reduce(tp, max)", "make_partial(tp)"]


def test_a_split_value_becomes_pending_by_way_of_the_whole():
    assert way("[12@tp]", "[12]+tp") == ["all_gather(0, tp)", "make_partial(tp)"]


# ---- several mesh dims


def test_mesh_dims_are_gathered_innermost_first():
    assert way("[16@dp.tp]", "[16]") == ["all_gather(0, tp)", "all_gather(0, dp)"]


def test_an_outer_mesh_dim_leaves_from_under_an_inner_one():
    assert way("[16@dp.tp]", "[16@tp]") == ["all_gather(0, tp)", "all_gather(0, dp)", "local_slice(0, tp)"]


def test_mesh_dims_are_sliced_outermost_first():
    assert way("[16]", "[16@tp.dp]") == ["local_slice(0, tp)", "local_slice(0, dp)"]


def test_slices_come_before_gathers():
    assert way("[16@dp, 8]", "[16, 8@tp]") == ["local_slice(1, tp)", "all_gather(0, dp)"]


def test_sums_are_scattered_before_they_are_reduced():
    assert way("[16, 8]+dp+tp", "[16@dp, 8]") == ["reduce_scatter(0, dp, sum)", "all_reduce(tp, sum)"]


def test_a_gather_waits_for_the_sum():
    assert way("[16@dp, 8]+tp", "[16, 8]") == ["all_reduce(tp, sum)", "all_gather(0, dp)"]


def test_two_mesh_dims_change_places():
    moves = way("[16@dp, 8@tp]", "[16@tp, 8@dp]")
    assert sorted({m.split("(")[0] for m in moves} - {"local_slice"}) in (["all_gather", "all_to_all"], ["all_to_all"])


# ---- any way, executed


def program(source: Spec, moves: tuple[Move, ...], dtype: torch.dtype = torch.int64) -> GraphModule:
    graph = Graph()
    node = graph.placeholder("x")
    value = torch.empty(source.shape, dtype=dtype, device="meta")
    node.meta = {"val": value, "spec": source}
    for move in moves:
        node = graph.call_function(getattr(collectives, move.kind), (node, *move.args))
        node.meta = {"val": value, "spec": move.after}
    graph.output((node,))
    return GraphModule({}, graph)


@st.composite
def ends(draw: st.DrawFn) -> tuple[Spec, Spec]:
    """Two layouts of one shape; pending only as a sum, of which every rank's part is known."""
    source = draw(specs(SMALL))
    free, dims = list(draw(st.permutations(list(SMALL.names)))), []
    for size in source.shape:
        count = draw(st.integers(0, len(free)))
        outer = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        where = draw(st.integers(0, count))
        parts = (Part(outer, tuple(free[:where])), Part(size // outer, tuple(free[where:count])))
        dims.append(canonical(parts, SMALL))
        free = free[count:]
    pending = {a: "sum" for a in free if draw(st.booleans())}
    return source, Spec(tuple(dims)).with_pending(pending, SMALL)


@given(ends())
def test_every_way_ends_where_it_should_with_the_same_global_value(pair: tuple[Spec, Spec]):
    source, target = pair
    moves = ways(source, target, 8, SMALL)
    assert (moves[-1].after if moves else source) == target
    gm = program(source, moves)
    verify(gm, Stage.LOCAL, SMALL)
    x = torch.randint(-9, 9, source.shape)
    (found,) = simulated(gm, SMALL, [x])
    assert torch.equal(found, x)


@given(ends())
def test_no_way_is_longer_than_undoing_everything_and_doing_it_again(pair: tuple[Spec, Spec]):
    source, target = pair
    assert len(ways(source, target, 8, SMALL)) <= 2 * len(SMALL.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("n", [12, 13, 14])
@pytest.mark.parametrize(
    ("source", "target"),
    [("[{n}@tp]", "[{n}]"), ("[{n}]+tp", "[{n}]"), ("[{n}]+tp", "[{n}@tp]"), ("[{n}]", "[{n}@tp]")],
)
def test_moves_keep_values_of_every_dtype(source: str, target: str, n: int, dtype: torch.dtype):
    before, after = (parse(t.format(n=n), MESH)[1] for t in (source, target))
    gm = program(before, ways(before, after, dtype.itemsize, MESH), dtype)
    x = torch.arange(n).to(dtype)
    (found,) = simulated(gm, MESH, [x])
    assert torch.equal(found, x)
