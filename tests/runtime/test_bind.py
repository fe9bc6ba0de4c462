"""A symbolic program as one rank's plain function: its numbers, its calls, its names, and what it leaves behind."""

import pytest
import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from shardc.compiler import collectives as c
from shardc.compiler.local import local_size, local_start
from shardc.compiler.mesh import Mesh
from shardc.compiler.spec import Part, Spec, canonical
from shardc.runtime.bind import bind_program
from shardc.runtime.groups import Groups
from shardc.runtime.shards import cut
from shardc.runtime.simulate import simulate
from shardc.runtime.wire import AllGather, Collective
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

    def done(self, *results: Node) -> GraphModule:
        self.graph.output(list(results))
        return GraphModule(self.root, self.graph)

    def _with(self, node: Node, spec: Spec) -> Node:
        node.meta = {"spec": spec, "val": torch.empty(spec.shape, device="meta"), "where": "mlp.py:3 in forward"}
        return node


def rows(n: int) -> Spec:
    return Spec((canonical((Part(n, ("tp",)),), TP), (Part(6),)))


def program() -> GraphModule:
    """[5@tp, 6]: view, two gathers of different sizes, a slice, sums, and a constant."""
    s = Sketch()
    split, whole = rows(5), Spec.whole((5, 6))
    x, w = s.input("x", split), s.input("w", rows(7))
    local = local_size(split.dims[0])
    flat = s.call(aten.view.default, (x, [local * 6]), Spec((canonical((Part(5, ("tp",)), Part(6)), TP),)))
    back = s.call(aten.view.default, (flat, [local, 6]), split)
    first = s.call(c.all_gather, (back, 0, "tp"), whole)
    second = s.call(c.all_gather, (w, 0, "tp"), Spec.whole((7, 6)))
    product = s.call(aten.mm.default, (first, s.call(aten.t.default, (second,), Spec.whole((6, 7)))), whole)
    mine = s.call(c.local_slice, (product, 1, "tp"), Spec((Part(5),), ()).with_dim(0, (Part(5),)))
    mine.meta["spec"] = Spec(((Part(5),), (Part(7, ("tp",)),)))
    viewed = s.call(aten.view.default, (mine, [5 * local_size((Part(7, ("tp",)),))]), Spec.whole((35,)))
    start = local_start((Part(7, ("tp",)),))
    numbers = s.call(aten.arange.start, (start, start + local_size((Part(7, ("tp",)),))), Spec.whole((7,)))
    s.root.register_buffer("constant", torch.arange(6.0))
    constant = s._with(s.graph.get_attr("constant"), Spec.whole((6,)))
    partial = s.call(c.make_partial, (constant, "tp"), Spec.whole((6,)))
    total = s.call(c.all_reduce, (partial, "tp"), Spec.whole((6,)))
    return s.done(first, viewed, numbers, total)


def bound(rank: int) -> GraphModule:
    return bind_program(program(), TP, TP.coords(rank), {})


def node(gm: GraphModule, name: str) -> Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def test_sizes_become_the_ranks_own_numbers():
    sizes = {r: [n.args[1] for n in bound(r).graph.find_nodes(op="call_function", target=aten.view.default)] for r in (0, 1)}
    assert sizes == {0: [[18], [3, 6], [20]], 1: [[12], [2, 6], [15]]}
    assert [node(bound(r), "arange").args for r in (0, 1)] == [(0, 4), (4, 7)]


def test_names_are_kept_and_the_rest_of_meta_is_not():
    before, after = program().graph.nodes, bound(1).graph.nodes
    assert [n.name for n in after] == [n.name for n in before]
    assert {frozenset(n.meta) for n in after} == {frozenset({"where"}), frozenset()}


def test_generated_code_is_plain_python():
    gm = bound(0)
    gathers = [n.target for n in gm.graph.nodes if isinstance(n.target, AllGather)]
    assert len(gathers) == 2 and gathers[0] is not gathers[1]
    assert gathers[0].shape == (5, 6) and gathers[1].shape == (7, 6)
    lines = [line.strip() for line in gm.code.splitlines()]
    assert "all_gather = shardc_runtime_wire_all_gather(view_1);  view_1 = None" in lines
    assert "all_gather_1 = shardc_runtime_wire_all_gather_1(w);  w = None" in lines
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
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    groups = Groups(mesh)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(n, 6, generator=generator) for n in (5, 7)]
    pieces = [[cut(x, rows(len(x)), TP, TP.coords(r)).clone() for r in (0, 1)] for x in whole]
    gm = program()
    expected = expected_on(gm, pieces, rank)
    found = bind_program(gm, groups.mesh, groups.coords, groups)(*(p[rank] for p in pieces))
    for result, value in zip(found, expected, strict=True):
        assert torch.equal(result, value)
    assert all(isinstance(call, Collective) for call in bound_calls(gm, groups))


def bound_calls(gm: GraphModule, groups: Groups) -> list:
    symbolic = [n.name for n in gm.graph.nodes if n.target in c.COLLECTIVES]
    here = bind_program(gm, groups.mesh, groups.coords, groups)
    return [node(here, name).target for name in symbolic]


@on_ranks
def test_real_ranks_compute_what_simulated_ones_do():
    run_ranks(run_bound, 2)
