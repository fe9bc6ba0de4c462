"""What programs move and hold, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from shardc.compiler.analysis.bytes_moved import collectives_of
from shardc.compiler.analysis.memory import peak_bytes
from shardc.compiler.ir.halves import halves
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from tests.build import (
    all_gather,
    all_reduce,
    all_to_all,
    build,
    context,
    local,
    local_slice,
    make_partial,
    reduce_scatter,
)

aten = torch.ops.aten
MESH = Mesh(dp=2, tp=4)


def moved(fn, mesh: Mesh = MESH, **types: str) -> list[tuple[str, str, int, int]]:
    gm = build(fn, mesh, Stage.RESHARDED, **types)
    return [(c.kind, c.mesh_dim, c.numel, c.bytes_on_wire) for c in collectives_of(gm, mesh)]


def one(fn, x: str, mesh: Mesh = MESH) -> tuple[int, int]:
    """(elements, bytes on the wire) of the only collective."""
    ((_, _, numel, sent),) = moved(fn, mesh, x=x)
    return numel, sent


# ---- bytes one rank sends


@pytest.mark.parametrize(
    ("fn", "x", "numel", "sent"),
    [
        # each rank sends its 3 x 8 floats to the next, three times
        (lambda x: all_gather(x, 0, "tp"), "f32[12@tp, 8]", 96, 3 * 3 * 8 * 4),
        # pieces of 4, 4, 4, 1 rows travel as four rows
        (lambda x: all_gather(x, 0, "tp"), "f32[13@tp, 8]", 104, 3 * 4 * 8 * 4),
        # the other mesh dim leaves half of the columns
        (lambda x: all_gather(x, 0, "tp"), "f32[12@tp, 8@dp]", 48, 3 * 3 * 4 * 4),
        (lambda x: all_gather(x, 0, "tp"), "f32[16@dp.tp, 8]", 64, 3 * 2 * 8 * 4),
        # whole heads: 1, 1, 1, 0 of 4 rows
        (lambda x: all_gather(x, 0, "tp"), "f32[(3@tp 4), 8]", 96, 3 * 4 * 8 * 4),
        (lambda x: reduce_scatter(x, 0, "tp"), "f32[12, 8]+tp", 96, 3 * 3 * 8 * 4),
        (lambda x: reduce_scatter(x, 0, "tp"), "f32[13, 8]+tp", 104, 3 * 4 * 8 * 4),
        (lambda x: reduce_scatter(x, 0, "tp"), "bf16[12, 8]+tp", 96, 3 * 3 * 8 * 2),
        # twice (n-1)/n of the value
        (lambda x: all_reduce(x, "tp"), "f32[12, 8]+tp", 96, 2 * 3 * 96 * 4 // 4),
        (lambda x: all_reduce(x, "dp"), "f64[12, 8@tp]+dp", 24, 24 * 8),
        (lambda x: all_reduce(x, "tp"), "i64[]+tp", 1, 12),
        # of its 3 rows each rank keeps a quarter of the columns and sends three
        (lambda x: all_to_all(x, 0, 1, "tp"), "f32[12@tp, 8]", 24, 3 * 3 * 2 * 4),
    ],
)
def test_bytes_on_the_wire(fn, x: str, numel: int, sent: int):
    assert one(fn, x) == (numel, sent)


def test_local_moves_move_nothing():
    assert moved(lambda x: make_partial(local_slice(x, 0, "tp"), "dp"), x="f32[12, 8]") == []


def test_a_mesh_dim_of_one_rank_moves_nothing():
    assert moved(lambda x: all_reduce(x, "tp"), Mesh(dp=2, tp=1), x="f32[8]+tp") == []


def test_collectives_come_in_program_order_with_their_source():
    def fn(x, tangent):
        return all_gather(all_reduce(x, "tp"), 0, "dp"), all_reduce(tangent, "tp")

    gm = build(fn, MESH, Stage.RESHARDED, x="f32[8@dp]+tp", tangent="f32[8]+tp")
    for node in gm.graph.nodes:
        node.meta |= {"path": f"path of {node}", "where": f"line of {node}", "why": "the plan"}
    found = collectives_of(gm, MESH)
    assert [(c.kind, c.mesh_dim, c.phase, c.dtype) for c in found] == [
        ("all_reduce", "tp", "forward", torch.float32),
        ("all_gather", "dp", "forward", torch.float32),
        ("all_reduce", "tp", "backward", torch.float32),
    ]
    assert [c.name for c in found] == ["all_reduce", "all_gather", "all_reduce_1"]
    assert (found[1].fqn, found[1].where, found[1].why) == ("path of all_gather", "line of all_gather", "the plan")


def test_collectives_inside_a_local_form_count_by_what_rank_0_holds():
    gm = local(lambda x: aten._softmax(x, 1, False), MESH, x="f32[8@dp, 16@tp]")
    found = collectives_of(gm, MESH)
    assert [(c.kind, c.mesh_dim, c.numel) for c in found] == [("all_reduce", "tp", 4), ("all_reduce", "tp", 4)]


# ---- bytes alive at once


def peak(fn, gradients: tuple[str, ...] = (), **types: str) -> int:
    gm = build(fn, MESH, Stage.RESHARDED, **types)
    signature = context(gm, MESH, gradients).signature
    return peak_bytes(halves(gm, signature), MESH)


def test_a_value_dies_after_its_last_use():
    # x, and two of the chain at a time
    assert peak(lambda x: aten.exp(aten.exp(aten.exp(aten.exp(x)))), x="f32[8]") == 3 * 32


def test_inputs_live_throughout_and_pieces_count_as_pieces():
    assert peak(lambda x: aten.exp(x), x="f32[8@tp, 8@dp]") == 2 * 2 * 4 * 4


def test_a_gathered_value_counts_whole_while_it_is_used():
    def fn(x, w):
        return aten.mm(aten.exp(aten.mm(x, all_gather(w, 0, "dp"))), aten.t(x))

    # x 64, the shard 32, the gathered w 64, x @ w 64
    assert peak(fn, x="f32[4, 4]", w="f32[4@dp, 4]") == 64 + 32 + 64 + 64


def test_views_hold_no_memory_of_their_own():
    assert peak(lambda x: aten.t(aten.view(aten.exp(x), [2, 4])), x="f32[8]") == 2 * 32


def test_a_view_keeps_what_it_shows_alive():
    def fn(x):
        v = aten.view(aten.exp(x), [2, 4])
        return aten.sum(aten.mul(aten.view(aten.neg(x), [2, 4]), v))

    assert peak(fn, x="f32[8]") == 4 * 32  # x, exp, neg and their product


def test_backward_holds_what_was_saved_until_its_last_use():
    def fn(x, w, tangent):
        h = aten.exp(aten.mm(x, w))
        return aten.neg(h), aten.mm(aten.t(x), aten.mul(tangent, h))

    # x 128, h 128 and the tangent 128 come in, w 64 is still there; tangent * h 128 is made, and h is free before the
    # gradient
    assert peak(fn, ("w",), x="f32[8, 4]", w="f32[4, 4]", tangent="f32[8, 4]") == 4 * 128 + 64


def test_the_peak_is_of_the_half_that_holds_more():
    def fn(x, w, tangent):
        return aten.sum(aten.exp(aten.exp(aten.mm(x, w)))), aten.mul(w, tangent)

    # forward: x 128, w 64, and two of 128; backward: w and the tangent in, the gradient made
    assert peak(fn, ("w",), x="f32[8, 4]", w="f32[4, 4]", tangent="f32[]") == 128 + 64 + 2 * 128
