"""Real collectives against simulated ones, bit for bit, on random layouts; their padding, errors and handles."""

import operator
import random
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.errors import RankFailure
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir import routes
from shardc.compiler.ir.collectives import Cut, cut_of
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Part, Spec, canonical, chunk, restrict
from shardc.runtime.run.bind import bind_program
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import combine
from shardc.runtime.shards import cut as cut_tensor
from shardc.runtime.wire import flat_pieces as pieces
from shardc.runtime.wire import wire
from shardc.runtime.wire.groups import Groups
from tests.runtime.ranks import on_ranks, run_ranks

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.bool,
    torch.complex64,
)
KINDS = (c.all_reduce, c.all_gather, c.reduce_scatter, c.all_to_all, c.local_slice, c.make_partial, c.fetch)
CASES = 60  # per kind and mesh


def poisoned(like: Tensor, numel: int) -> Tensor:
    """Memory that shows wherever it is read before it was written."""
    poison = {torch.bool: True, torch.int64: -777, torch.int16: -777}.get(like.dtype, float("nan"))
    return like.new_full((numel,), poison)


def poison_memory() -> None:
    for module in (wire, pieces):
        module.room = poisoned


def draw_tensor(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=rng, dtype=torch.float64) * 4
    if dtype is torch.complex64:
        return torch.complex(values, torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    return values > 0 if dtype is torch.bool else values.to(dtype)


def strange_memory(x: Tensor, rng: random.Random) -> Tensor:
    """The same values, laid out in another order now and then."""
    return x.mT.contiguous().mT if x.dim() > 1 and rng.random() < 0.3 else x


def draw_layout(mesh: Mesh, rng: random.Random, axes: list[str]) -> Spec:
    """A random layout over some of the mesh dims: sizes from 0, compound dims, uneven and empty pieces."""
    dims = [draw_dim(rng) for _ in range(rng.randint(1, 3))]
    pending = {}
    for axis in axes:
        fate = rng.choice(("split", "split", "whole", "sum"))
        if fate == "split":
            dim = rng.choice(dims)
            i = rng.randrange(len(dim))
            dim[i] = Part(dim[i].size, (*dim[i].axes, axis))
        elif fate == "sum":
            pending[axis] = "sum"
    spec = Spec(tuple(canonical(tuple(d), mesh) for d in dims))
    return spec.with_pending(pending, mesh)


def draw_dim(rng: random.Random) -> list[Part]:
    if rng.random() < 0.5:
        return [Part(rng.randint(0, 13))]
    return [Part(rng.randint(1, 4)), Part(rng.randint(1, 5))]


def split_innermost(spec: Spec, d: int, axis: str, mesh: Mesh, rng: random.Random) -> Spec | None:
    """Dim d split over one more mesh dim, anywhere in it, as the last of its part's; None where it does not stay so."""
    parts = list(spec.dims[d])
    i = rng.randrange(len(parts))
    parts[i] = Part(parts[i].size, (*parts[i].axes, axis))
    dim = canonical(tuple(parts), mesh)
    others = [a for p in spec.dims[d] for a in p.axes]
    innermost = any(p.axes and p.axes[-1] == axis for p in dim)
    return spec.with_dim(d, dim) if innermost and restrict(dim, others, mesh) == spec.dims[d] else None


def draw_runs(n: int, rng: random.Random, beyond: int) -> tuple[tuple[int, int, int], ...]:
    """Stretches of n indices, some backwards, some over again, perhaps none; and so many before and after them."""
    steps = [rng.choice((1, -1, 2)) for _ in range(rng.randint(0, 3))] if n or beyond else []
    return tuple((*(rng.randrange(-beyond, n + beyond) for _ in range(2)), step) for step in steps)


def draw_change(kind, mesh: Mesh, rng: random.Random) -> tuple[Spec, Spec, tuple]:
    """(layout before, layout after, arguments) of one collective."""
    while True:
        axis = rng.choice(mesh.names)
        bare = draw_layout(mesh, rng, [a for a in mesh.names if a != axis])
        d = rng.randrange(len(bare.dims))
        split = split_innermost(bare, d, axis, mesh, rng)
        op = rng.choice(("sum", "sum", "max", "min", "prod"))
        pending = bare.with_pending({**dict(bare.pending), axis: op}, mesh)
        if kind is c.all_reduce:
            return pending, bare, (axis, op)
        if kind is c.make_partial:
            return bare, bare.with_pending({**dict(bare.pending), axis: "sum"}, mesh), (axis,)
        if split is None:
            continue
        if kind is c.fetch:
            (part, *more) = split.dims[d]
            if more or part.axes != (axis,):
                continue
            held = tuple(chunk(part.size, mesh, (axis,), {axis: i})[1] for i in range(mesh[axis]))
            fill = rng.choice(((), (0.0,), (1.0,)))
            runs = tuple(draw_runs(part.size, rng, 3 * len(fill)) for _ in held)
            return split, split, (d, axis, held, runs, *fill)
        if kind is c.all_gather:
            return split, bare, (d, axis)
        if kind is c.reduce_scatter:
            return pending, split, (d, axis, op)
        if kind is c.local_slice:
            return bare, split, (d, axis)
        to = rng.randrange(len(bare.dims))
        other = split_innermost(bare, to, axis, mesh, rng)
        if to != d and other is not None:
            return split, other, (d, to, axis)


class Case(NamedTuple):
    kind: Callable
    before: Spec
    after: Spec
    args: tuple
    pieces: list[Tensor]  # every rank's operand

    def __str__(self) -> str:
        what = f"{self.kind.__name__}{self.args} {self.before} -> {self.after}"
        return f"{what} {self.pieces[0].dtype}"


def draw(kind: Callable, mesh: Mesh, seed: int) -> Case:
    rng = random.Random(seed)
    before, after, args = draw_change(kind, mesh, rng)
    dtype = rng.choice(DTYPES)
    if dtype.is_complex and {"max", "min", "prod"} & set(args):
        dtype = torch.float32  # complex has no order, and its product rounds as the elements fall into vectors
    gen = torch.Generator().manual_seed(seed)
    shapes = [before.local_shape(mesh, mesh.coords(r)) for r in range(mesh.size)]
    pieces = [strange_memory(draw_tensor(shape, dtype, gen), rng) for shape in shapes]
    return Case(kind, before, after, args, pieces)


def program(cases: list[Case]) -> GraphModule:
    """All cases side by side, as they are in a real program."""
    graph = Graph()
    inputs = [graph.placeholder(f"x_{i}") for i in range(len(cases))]
    results = []
    for x, case in zip(inputs, cases, strict=True):
        x.meta["spec"] = case.before
        results.append(graph.call_function(case.kind, (x, *case.args)))
        results[-1].meta["spec"] = case.after
    graph.output(results)
    return GraphModule(torch.nn.Module(), graph)


def joint_program(cases: list[Case]) -> GraphModule:
    """All cases again, where several values can move at once as few moves."""
    graph = Graph()
    inputs = [graph.placeholder(f"x_{i}") for i in range(len(cases))]
    at_once: dict[tuple, list[int]] = {}
    for i, (x, case) in enumerate(zip(inputs, cases, strict=True)):
        x.meta["spec"] = case.before
        rest = case.args if case.kind is c.all_reduce else case.args[1:]
        at_once.setdefault((case.kind, *rest, case.pieces[0].dtype), []).append(i)
    results: dict[int, Node] = {}
    for (kind, *rest, _), members in at_once.items():
        dims = [] if kind is c.all_reduce else [[cases[i].args[0] for i in members]]
        move = graph.call_function(kind, ([inputs[i] for i in members], *dims, *rest))
        move.meta["spec"] = tuple(cases[i].after for i in members)
        for place, i in enumerate(members):
            results[i] = graph.call_function(operator.getitem, (move, place))
            results[i].meta["spec"] = cases[i].after
    graph.output([results[i] for i in range(len(cases))])
    return GraphModule(torch.nn.Module(), graph)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def compare(rank: int, mesh: Mesh, groups: Groups, cases: list[Case]) -> None:
    alone = program(cases)
    expected = simulate(alone, mesh, [case.pieces for case in cases])
    check(rank, mesh, groups, cases, alone, expected)
    joint = [i for i, case in enumerate(cases) if case.kind in (c.all_gather, c.reduce_scatter, c.all_reduce)]
    some = [cases[i] for i in joint]
    check(rank, mesh, groups, some, joint_program(some), [expected[i] for i in joint])


def check(
    rank: int, mesh: Mesh, groups: Groups, cases: list[Case], gm: GraphModule, expected: list[list[Tensor]]
) -> None:
    mine = [case.pieces[rank] for case in cases]
    kept = [x.clone() for x in mine]
    found = bind_program(gm, mesh, mesh.coords(rank), groups)(*mine)
    for case, result, others, operand, copy in zip(cases, found, expected, mine, kept, strict=True):
        assert same_bits(result, others[rank]), f"{case}, rank {rank} of {mesh}\n{result}\n{others[rank]}"
        assert same_bits(operand, copy), f"operand changed: {case}"
        if case.kind in c.COLLECTIVES and operand.numel():
            assert result.is_contiguous(), case
            assert result.untyped_storage().data_ptr() != operand.untyped_storage().data_ptr(), case


def random_layouts(rank: int, nproc: int) -> None:
    poison_memory()
    for mesh in {2: [Mesh(tp=2)], 4: [Mesh(tp=4), Mesh(dp=2, tp=2)]}[nproc]:
        groups = Groups(init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.names))
        compare(rank, mesh, groups, [draw(kind, mesh, seed) for kind in KINDS for seed in range(CASES)])


@on_ranks
@pytest.mark.parametrize("nproc", [2, 4])
def test_random_layouts_equal_the_simulation_bit_for_bit_over_poisoned_memory(nproc: int):
    run_ranks(random_layouts, nproc, (nproc,))


def summands(n: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    return [draw_tensor((numel,), dtype, torch.Generator().manual_seed(r)) for r in range(n)]


def large_reductions(line: wire.Line) -> None:
    """Sizes that go in two rounds, or for sums of two ranks through the backend; no multiple of the ranks."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64):
        pieces = summands(line.size, 600_001, dtype)
        for op in ("sum",) if dtype.is_complex else ("sum", "max"):
            found = wire.AllReduce(op, line)(pieces[line.index])
            assert same_bits(found, combine(op, pieces)), (dtype, op)
    real = [p.real.contiguous() for p in pieces]
    real[0][7] = float("nan")
    assert wire.AllReduce("max", line)(real[line.index])[7].isnan(), "torch's maximum keeps NaN"


def through_the_backend(line: wire.Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nccl would be given, given to gloo: the same sums up to their order."""
    monkeypatch.setattr(wire.Line, "backend", lambda self, x: "nccl")
    n = line.size
    for shape, dim in [((13, 3), 0), ((3, 13), 1), ((2, 4 * n), 1), ((2 * n, 5), 0), ((1, 3), 0)]:
        pieces = [p.view(shape) for p in summands(n, shape[0] * shape[1], torch.float64)]
        mesh = Mesh(tp=n)
        whole = Spec.whole(shape)
        split = whole.split(dim, "tp", mesh)
        coords = {"tp": line.index}
        cut = cut_of(split, dim, "tp", mesh, coords, split)
        local = split.local_shape(mesh, coords)
        found = wire.ReduceScatter([cut], [local], "sum", line)(pieces[line.index])
        total = combine("sum", pieces)
        torch.testing.assert_close(found, cut_tensor(total, split, mesh, coords))
        torch.testing.assert_close(wire.AllReduce("sum", line)(pieces[line.index]), total)
    monkeypatch.undo()


def handles(line: wire.Line) -> None:
    """Two under way at once, waited for in the other order; leaves that require gradients may be sent."""
    n = line.size
    pieces = summands(n, 10, torch.float32)
    reduce = wire.AllReduce("sum", line)
    gather = wire.AllGather([Cut((10 * n,), 0, (10,) * n)], [(10 * n,)], line)
    leaf = torch.nn.Parameter(pieces[line.index])
    first, second = reduce.start(leaf), gather.start(leaf)
    assert same_bits(gather.wait(second), torch.cat(pieces))
    assert same_bits(reduce.wait(first), combine("sum", pieces))


def absent_rank(rank: int) -> str:
    """The error on rank 0 where the others never call the collective."""
    n = dist.get_world_size()
    group = dist.new_group(timeout=timedelta(seconds=1))
    assert isinstance(group, dist.ProcessGroup)
    line = wire.Line("tp", n, rank, group)
    if rank != 0:
        return ""
    with pytest.raises(RankFailure) as caught:
        wire.AllReduce("sum", line, "%grad")(torch.ones(3))
    return str(caught.value)


def memory_of_each_route(line: wire.Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a collective takes is what its route says."""
    taken: list[int] = []

    def counted(like: Tensor, numel: int) -> Tensor:
        taken.append(numel * like.element_size())
        return like.new_empty(numel)

    monkeypatch.setattr(wire, "room", counted)
    n, gathers = line.size, Cut((2 * line.size,), 0, (2,) * line.size)
    for numel in (4 * n, (1 << 18) // n, 1 << 20):
        for op, reuse in (("sum", True), ("sum", False), ("max", False)):
            route = routes.reduced(4 * numel, n, op, torch.float32, "gloo", reuse)
            taken.clear()
            issued = wire.AllReduce(op, line, reuse=reuse).start(torch.ones(numel))
            assert sum(taken) == (0 if route.how == "backend" else route.received), route  # a copy is no room
            wire.AllReduce(op, line).wait(issued)
    for several in (False, True):
        cuts = [gathers] * (1 + several)
        rows, xs = routes.joint_rows(cuts), [torch.ones(2 * n)] * (1 + several)
        route, taken[:] = routes.scattered(rows, several, line.index, "max", torch.float32, "gloo"), []
        wire.ReduceScatter(cuts, [(2,)] * len(cuts), "max", line)(xs)
        assert sum(taken) == route.received, route
        route, taken[:] = routes.gathered(rows, 4, not several), []
        wire.AllGather(cuts, [(2 * n,)] * len(cuts), line)([x[:2] for x in xs])
        laid = 4 * rows[0] * (several and n > 2)  # of two ranks each sends from where it receives
        assert sum(taken) == route.received + laid, route
    monkeypatch.undo()


def every_route(rank: int, nproc: int) -> str:
    poison_memory()
    everyone = dist.group.WORLD
    assert everyone is not None
    line = wire.Line("tp", nproc, rank, everyone)
    large_reductions(line)
    with pytest.MonkeyPatch.context() as monkeypatch:
        through_the_backend(line, monkeypatch)
        memory_of_each_route(line, monkeypatch)
    handles(line)
    return absent_rank(rank)


@on_ranks
@pytest.mark.parametrize("nproc", [2, 4])
def test_large_reductions_handles_and_an_absent_rank(nproc: int):
    told = run_ranks(every_route, nproc, (nproc,))[0]
    ranks = ", ".join(map(str, range(nproc)))
    assert told.startswith(f"rank 0 could not finish %grad, all_reduce over tp (ranks {ranks}): ")


def test_a_rank_alone_gets_its_operand_back():
    line = wire.Line("tp", 1, 0, None)
    x = torch.arange(6.0).view(2, 3)
    cut = Cut((2, 3), 0, (2,))
    for call in (
        wire.AllReduce("sum", line),
        wire.AllGather([cut], [(2, 3)], line),
        wire.ReduceScatter([cut], [(2, 3)], "sum", line),
        wire.AllToAll(cut, cut, (2, 3), True, line),
    ):
        assert same_bits(call(x), x) and call(x).data_ptr() == x.data_ptr()
        assert call(x.mT.contiguous().mT).is_contiguous()


@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (3, 0), (1, 3, 1), (0, 2)])
@pytest.mark.parametrize("leading", [1, 2])
def test_pieces_are_dealt_and_joined_whichever_rank_holds_less(sizes: tuple[int, ...], leading: int):
    dealer = pieces.Pieces([Cut((leading, sum(sizes), 2), 1, sizes)])
    x = torch.arange(leading * sum(sizes) * 2.0)
    shape = dealer.cuts[0].view
    dealt = dealer.dealt([x])
    assert torch.equal(dealer.joined(dealt)[0].view(shape), x.view(shape))
    rows = dealer.dealt([x], dealer.longest)
    assert torch.equal(dealer.joined(rows, dealer.longest)[0].view(shape), x.view(shape))
    for row, flat in zip(rows.view(len(sizes), -1), dealt.split_with_sizes(dealer.numels), strict=True):
        assert torch.equal(row[: flat.numel()], flat)
