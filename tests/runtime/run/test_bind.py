"""A symbolic program as one rank's plain function: its numbers, its calls, its names, and what it leaves behind."""

import operator

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.rank_numbers import local_size, local_start
from shardc.compiler.spec.spec import Part, Spec, canonical
from shardc.runtime.run.bind import bind_program
from shardc.runtime.shards import cut
from shardc.runtime.wire.groups import Groups
from shardc.runtime.wire.wire import AllGather
from tests.runtime.ranks import on_ranks, run_ranks

aten = torch.ops.aten
TP = Mesh(tp=2)


class Sketch:
    """A LOCAL graph written by hand: every value with its layout."""

    def __init__(self) -> None:
        self.graph, self.root = Graph(), torch.nn.Module()

    def input(self, name: str, spec: Spec) -> Node:
        return self._with(self.graph.placeholder(name), spec)

    def call(self, target, args: tuple, spec: Spec, **kwargs) -> Node:
        return self._with(self.graph.call_function(target, args, kwargs), spec)

    def attribute(self, name: str, spec: Spec) -> Node:
        return self._with(self.graph.get_attr(name), spec)

    def done(self, *results: Node) -> GraphModule:
        self.graph.output(list(results))
        return GraphModule(self.root, self.graph)

    def _with(self, node: Node, spec: Spec) -> Node:
        node.meta = {"spec": spec, "val": torch.empty(spec.shape, device="meta"), "where": "mlp.py:3 in forward"}
        return node


def rows(n: int) -> Spec:
    return Spec((canonical((Part(n, ("tp",)),), TP), (Part(6),)))


COLUMNS = (Part(7, ("tp",)),)  # of a [5, 7@tp]


def program() -> GraphModule:
    """x: [5@tp, 6] and w: [7@tp, 6], gathered and multiplied, a slice of the product viewed flat; a constant."""
    s = Sketch()
    split, whole = rows(5), Spec.whole((5, 6))
    x, w = s.input("x", split), s.input("w", rows(7))
    local, start, columns = local_size(split.dims[0]), local_start(COLUMNS), local_size(COLUMNS)
    flat = s.call(aten.view.default, (x, [local * 6]), Spec((canonical((Part(5, ("tp",)), Part(6)), TP),)))
    back = s.call(aten.view.default, (flat, [local, 6]), split)
    first = s.call(c.all_gather, (back, 0, "tp"), whole)
    second = s.call(c.all_gather, (w, 0, "tp"), Spec.whole((7, 6)))
    turned = s.call(aten.t.default, (second,), Spec.whole((6, 7)))
    product = s.call(aten.mm.default, (first, turned), Spec.whole((5, 7)))
    mine = s.call(c.local_slice, (product, 1, "tp"), Spec(((Part(5),), COLUMNS)))
    viewed = s.call(aten.view.default, (mine, [5 * columns]), Spec(((Part(5), *COLUMNS),)))
    numbers = s.call(aten.arange.start, (start, start + 2), Spec.whole((2,)))
    s.root.register_buffer("constant", torch.arange(6.0))
    constant = s.attribute("constant", Spec.whole((6,)))
    partial = s.call(c.make_partial, (constant, "tp"), Spec.whole((6,)))
    total = s.call(c.all_reduce, (partial, "tp"), Spec.whole((6,)))
    return s.done(first, viewed, numbers, total)


def bound(rank: int) -> GraphModule:
    return bind_program(program(), TP, TP.coords(rank), {})


def node(gm: GraphModule, name: str) -> Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def test_sizes_become_the_ranks_own_numbers():
    views = [bound(r).graph.find_nodes(op="call_function", target=aten.view.default) for r in (0, 1)]
    assert [[n.args[1] for n in nodes] for nodes in views] == [[[18], [3, 6], [20]], [[12], [2, 6], [15]]]
    assert [node(bound(r), "arange_start").args for r in (0, 1)] == [(0, 2), (4, 6)]


def test_names_are_kept_and_the_rest_of_meta_is_not():
    before, after = program().graph.nodes, bound(1).graph.nodes
    assert [n.name for n in after] == [n.name for n in before]
    assert {frozenset(n.meta) for n in after} == {frozenset({"where"}), frozenset()}


def test_generated_code_is_plain_python():
    gm = bound(0)
    gathers = [n.target for n in gm.graph.nodes if isinstance(n.target, AllGather)]
    assert len(gathers) == 2 and gathers[0] is not gathers[1]
    assert gathers[0].shapes == [(5, 6)] and gathers[1].shapes == [(7, 6)]
    lines = [line.strip() for line in gm.code.splitlines()]
    assert "all_gather = shardc_runtime_wire_wire_all_gather(view_default_1);  view_default_1 = None" in lines
    assert "all_gather_1 = shardc_runtime_wire_wire_all_gather_1(w);  w = None" in lines
    assert not {"spec", "Local", "mesh"} & set(gm.code.replace("(", " ").split())
    assert gm.constant is not None and type(gm).__name__ == "RankProgram"


def test_make_partial_keeps_the_value_on_the_first_rank_only():
    assert node(bound(0), "make_partial").target is aten.alias.default
    assert node(bound(1), "make_partial").target is aten.zeros_like.default


def test_a_local_slice_is_contiguous_and_one_call():
    call = node(bound(1), "local_slice")
    x = torch.arange(35.0).view(5, 7)
    piece = call.target(x, *call.args[1:])  # pyright: ignore
    assert torch.equal(piece, x[:, 4:]) and piece.is_contiguous()


def test_what_is_not_local_is_refused():
    s = Sketch()
    x = s.input("x", Spec.whole((4, 6)))
    gm = s.done(s.call(c.reshard, (x, rows(4)), rows(4)))
    with pytest.raises(ValueError, match="%reshard: call_function of .* has no place in a local program"):
        bind_program(gm, TP, TP.coords(0), {})


def run_bound(rank: int) -> None:
    groups = Groups(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=generator) for n in (5, 7))
    gm = bind_program(program(), groups.mesh, groups.coords, groups)
    for _ in range(2):
        first, viewed, numbers, total = gm(*(cut(v, rows(len(v)), TP, groups.coords) for v in (x, w)))
        columns = slice(0, 4) if rank == 0 else slice(4, 7)
        assert torch.equal(first, x)
        assert torch.equal(viewed, (x @ w.t())[:, columns].reshape(-1))
        assert numbers.tolist() == [columns.start, columns.start + 1]
        assert torch.equal(total, torch.arange(6.0))


@on_ranks
def test_two_ranks_compute_what_the_program_means():
    run_ranks(run_bound, 2)


def averaged(*numbers: int | None) -> list[str]:
    """What averages each of as many sums that are scattered at once; None: nothing does."""
    s = Sketch()
    summed = Spec.whole((4, 6)).with_pending({"tp": "sum"}, TP)
    inputs = [s.input(f"x_{i}", summed) for i in range(len(numbers))]
    moved = s.call(c.reduce_scatter, (inputs, [0] * len(numbers), "tp"), rows(4))
    moved.meta |= {"spec": (rows(4),) * len(numbers), "val": None}
    results = [s.call(operator.getitem, (moved, i), rows(4)) for i in range(len(numbers))]
    for i, number in enumerate(numbers):
        if number is not None:
            results[i] = s.call(aten.div.Tensor, (results[i], number), rows(4))
    gm = bind_program(s.done(*results), TP, {"tp": 0}, {})
    divisor = next(n for n in gm.graph.nodes if n.name.startswith("reduce_scatter")).target.divisor
    return [str(divisor), *(n.target.__name__ for n in gm.graph.nodes if n.name.startswith("div"))]


def test_sums_that_move_at_once_are_averaged_at_once():
    assert averaged(2, 2, 2) == ["2", "given", "given", "given"]


@pytest.mark.parametrize("numbers", [(2, 3), (2, None), (None, None)])
def test_left_alone_sums_that_are_averaged_by_different_numbers_or_not_at_all(numbers):
    assert averaged(*numbers) == ["None", *("div_" for n in numbers if n)]
