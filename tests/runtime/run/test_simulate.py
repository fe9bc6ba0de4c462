"""All ranks in lockstep: every collective on pieces, against the definition of what it does."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.node import spec
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.runtime.run import simulate as simulate_module
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import cut
from shardc.runtime.workers import run_on_devices
from tests.build import (
    all_gather,
    all_reduce,
    all_to_all,
    build,
    local,
    local_slice,
    make_partial,
    on_one_device,
    random_inputs,
    reduce_scatter,
    simulated,
)
from tests.spec.test_spec import specs

aten = torch.ops.aten
MESH, SMALL = Mesh(dp=2, tp=3), Mesh(a=2, b=3)


def run(fn, pieces: list[torch.Tensor], mesh: Mesh = MESH, *, x: str) -> list[torch.Tensor]:
    """What each rank holds of the only result, from what each holds of the only input, of type x."""
    return simulate(build(fn, mesh, Stage.RESHARDED, x=x), mesh, [pieces])[0]


def ranks(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v]) for v in values]


def numbers(pieces: list[torch.Tensor]) -> list[list[float]]:
    return [p.tolist() for p in pieces]


def test_all_reduce_adds_along_its_mesh_dim_only():
    found = run(lambda x: all_reduce(x, "tp"), ranks(1, 2, 3, 10, 20, 30), x="f32[1]+tp")
    assert numbers(found) == [[6.0]] * 3 + [[60.0]] * 3
    found = run(lambda x: all_reduce(x, "dp"), ranks(1, 2, 3, 10, 20, 30), x="f32[1]+dp")
    assert numbers(found) == [[11.0], [22.0], [33.0]] * 2


@pytest.mark.parametrize(("op", "expected"), [("max", 3.0), ("min", 1.0), ("prod", 6.0)])
def test_all_reduce_by_other_reductions(op: str, expected: float):
    found = run(lambda x: all_reduce(x, "tp", op), ranks(1, 2, 3, 1, 2, 3), x=f"f32[1]+{op}(tp)")
    assert numbers(found) == [[expected]] * 6


def test_all_gather_joins_uneven_pieces_in_order():
    x = [torch.tensor(v) for v in ([0, 1], [2, 3], [4], [5, 6], [7, 8], [9])]
    found = run(lambda x: all_gather(x, 0, "tp"), x, x="i64[5@tp]")
    assert numbers(found) == [[0, 1, 2, 3, 4]] * 3 + [[5, 6, 7, 8, 9]] * 3


def test_all_gather_of_whole_blocks_interleaves_nothing():
    x = [torch.tensor(v) for v in ([0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5])]
    assert numbers(run(lambda x: all_gather(x, 0, "tp"), x, x="i64[(3@tp 2)]")) == [[0, 1, 2, 3, 4, 5]] * 6


def test_all_gather_of_pieces_of_each_third_interleaves_them():
    mesh = Mesh(tp=2)
    x = [torch.tensor([0, 1, 4, 5, 8, 9]), torch.tensor([2, 3, 6, 7, 10, 11])]
    assert numbers(run(lambda x: all_gather(x, 0, "tp"), x, mesh, x="i64[(3 4@tp)]")) == [list(range(12))] * 2


def test_reduce_scatter_adds_and_deals():
    x = [torch.arange(4) * 10**r for r in range(6)]
    found = run(lambda x: reduce_scatter(x, 0, "tp"), x, x="i64[4]+tp")
    assert numbers(found) == [[0, 111], [222, 333], [], [0, 111000], [222000, 333000], []]


def test_all_to_all_moves_the_split_from_one_dim_to_another():
    x = torch.arange(4 * 3).view(4, 3)
    mesh = Mesh(tp=2)
    found = run(lambda x: all_to_all(x, 0, 1, "tp"), [x[:2], x[2:]], mesh, x="i64[4@tp, 3]")
    assert [torch.equal(p, q) for p, q in zip(found, (x[:, :2], x[:, 2:]), strict=True)] == [True, True]


def test_local_moves_send_nothing():
    found = run(lambda x: local_slice(x, 0, "tp"), [torch.arange(4)] * 6, x="i64[4]")
    assert numbers(found) == [[0, 1], [2, 3], []] * 2
    found = run(lambda x: make_partial(x, "dp"), ranks(1, 2, 3, 1, 2, 3), x="f32[1]")
    assert numbers(found) == [[1.0], [2.0], [3.0], [0.0], [0.0], [0.0]]


def test_an_operator_runs_on_every_ranks_own_piece():
    found = run(lambda x: aten.mul(x, 2), ranks(1, 2, 3, 4, 5, 6), x="f32[6@dp.tp]")
    assert numbers(found) == [[2.0], [4.0], [6.0], [8.0], [10.0], [12.0]]


def test_sizes_are_the_ranks_own():
    def fn(x):
        return aten.view(x, [12])

    gm = local(fn, MESH, x="f64[4@tp, 3]")
    layout = spec(placeholders(gm)[0])
    given = [cut(torch.ones(4, 3), layout, MESH, MESH.coords(r)) for r in range(6)]
    assert [len(p) for p in simulate(gm, MESH, [given])[0]] == [6, 6, 0] * 2


def test_every_rank_draws_the_same_and_the_generator_moves_once():
    def fn(x):
        return aten.rand_like(x), aten.rand_like(x)

    gm = build(fn, MESH, Stage.RESHARDED, x="f32[5]")
    first, second = simulate(gm, MESH, [[torch.empty(5)] * 6])
    after = torch.rand(1)
    torch.manual_seed(0)
    want = torch.rand(5), torch.rand(5), torch.rand(1)
    assert all(torch.equal(p, want[0]) for p in first) and all(torch.equal(p, want[1]) for p in second)
    assert torch.equal(after, want[2])


# ---- the run itself


def chain() -> GraphModule:
    def fn(x):
        return aten.exp(aten.neg(aten.relu(x)))

    return build(fn, MESH, Stage.RESHARDED, x="f32[6@tp]")


def test_a_watcher_sees_every_value_as_it_is_made():
    seen = []
    simulate(chain(), MESH, [[torch.ones(2)] * 6], lambda node, pieces: seen.append((node.name, len(pieces))))
    assert seen == [("x", 6), ("relu", 6), ("neg", 6), ("exp", 6)]


def test_values_are_dropped_after_their_last_use():
    alive: dict[str, weakref.ref] = {}
    counts = []

    def watch(node, pieces) -> None:
        alive[node.name] = weakref.ref(pieces[0])
        counts.append([name for name, ref in alive.items() if ref() is not None])

    simulate(chain(), MESH, [[torch.ones(2) for _ in range(6)]], watch)
    assert counts == [["x"], ["x", "relu"], ["x", "relu", "neg"], ["x", "neg", "exp"]]  # the caller holds x


def gathered_between(x):
    y = aten.exp(aten.neg(x))
    return aten.exp(aten.neg(all_gather(y, 0, "tp")))


def test_between_collectives_ranks_run_by_the_executor_that_replicas_have(monkeypatch: pytest.MonkeyPatch):
    """One thread per rank, in the caller's modes; a random operator is a step of its own."""
    seen = []

    def watched(calls, devices, **options):
        seen.append((len(calls), {str(d) for d in devices}))
        return run_on_devices(calls, devices, **options)

    monkeypatch.setattr(simulate_module, "run_on_devices", watched)
    gm = build(gathered_between, MESH, Stage.RESHARDED, x="f32[6@tp]")
    simulate(gm, MESH, [[torch.ones(2)] * 6])
    assert seen == [(6, {"cpu"})] * 2
    seen.clear()
    simulate(build(lambda x: aten.rand_like(x), MESH, Stage.RESHARDED, x="f32[6]"), MESH, [[torch.ones(6)] * 6])
    assert seen == []


def test_an_error_on_a_rank_reaches_the_caller_with_the_call_that_raised_it():
    gm = chain()
    with pytest.raises(RuntimeError, match="None") as caught:
        simulate(gm, MESH, [[None] * 6])
    assert "%relu = aten.relu" in "".join(caught.value.__notes__)


class Alive(TorchDispatchMode):
    """How many results of earlier operators were alive when each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[weakref.ref] = []
        self.counts: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts.append(sum(ref() is not None for ref in self.results))
        result = func(*args, **(kwargs or {}))
        self.results.append(weakref.ref(result))
        return result


def test_a_stretch_drops_values_after_their_last_use_too():
    one = Mesh(tp=1)  # one rank runs in this thread, where the mode is
    gm = build(lambda x: aten.exp(aten.neg(aten.relu(aten.exp(x)))), one, Stage.RESHARDED, x="f32[6]")
    x = torch.ones(6)
    with Alive() as alive:
        simulate(gm, one, [[x]])
    assert alive.counts == [0, 1, 1, 1]


def test_what_is_returned_may_be_no_value():
    gm = chain()
    end = gm.graph.output_node()
    end.args = ((end.args[0][0], None),)  # pyright: ignore
    assert simulate(gm, MESH, [[torch.ones(2)] * 6])[1] == [None] * 6


@given(st.data())
def test_collectives_on_any_layout_are_identities_on_the_global_value(data: st.DataObject):
    layout: Spec = data.draw(specs(SMALL))
    layout = layout.with_pending({a: "sum" for a, _ in layout.pending}, SMALL)
    axis = data.draw(st.sampled_from(["a", "b"]))
    at, other = layout.dim_of(axis), data.draw(st.integers(0, len(layout.dims) - 1))
    inner = at is not None and any(p.axes[-1:] == (axis,) for p in layout.dims[at])
    if at is not None and not inner:
        return

    def fn(x):
        if layout.reduction(axis):
            return all_reduce(x, axis), reduce_scatter(x, other, axis)
        if at is None:
            return local_slice(x, other, axis), make_partial(x, axis)
        return (all_gather(x, at, axis), *([all_to_all(x, at, other, axis)] if other != at else []))

    gm = build(fn, SMALL, Stage.RESHARDED, x=layout.text(torch.float64))
    inputs = random_inputs(gm)
    if any(axis in p.axes[:-1] for n in returned(gm) for dim in spec(n).dims for p in dim):
        return  # the plain split merged with others, and is no longer the innermost
    for have, want in zip(simulated(gm, SMALL, inputs), on_one_device(gm, inputs), strict=True):
        assert torch.equal(have, want)
