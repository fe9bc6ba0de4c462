"""Scheduled programs on real ranks: what was started is waited for, what moved together comes back apart."""

import torch
from torch.distributed.device_mesh import init_device_mesh

from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.node import spec
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.mesh import Mesh
from shardc.passes.local.join_messages import JoinMessages
from shardc.passes.local.localize import Localize
from shardc.passes.local.overlap import Overlap
from shardc.runtime.run.bind import bind_program
from shardc.runtime.shards import cut
from shardc.runtime.wire.groups import Groups
from tests.build import all_gather, all_reduce, all_to_all, apply, build, context, on_one_device, reduce_scatter
from tests.runtime.ranks import on_ranks, run_ranks

aten = torch.ops.aten
DP = Mesh(dp=2)
TYPES = dict(x="f64[5@dp, 3]", w="f64[3@dp, 3]", u="f64[3, 3]", v="f64[3, 3]", tangent="f64[5@dp, 3]")


def step(x, w, u, v, tangent):
    """A forward, a gradient scattered, and two that are reduced in one message; every kind of collective on the way."""
    whole = all_gather(w, 0, "dp")
    turned = all_to_all(aten.relu(x), 0, 1, "dp")
    h = aten.mm(aten.neg(x), whole)
    y = aten.mm(aten.mm(h, u), v)
    grads = [aten.mm(aten.t(value), aten.mul(tangent, i)) for i, value in enumerate((x, h, y), start=1)]
    scattered = aten.div(reduce_scatter(grads[0], 0, "dp"), 2)
    return y, aten.neg(turned), scattered, *(aten.div(all_reduce(g, "dp"), 2) for g in grads[1:])


def program():
    gm = build(step, DP, Stage.RESHARDED, **TYPES)
    ctx = context(gm, DP, ("w", "u", "v"), data_axes=("dp",))
    for passed in (Localize(), JoinMessages(), Overlap()):
        apply(passed, gm, ctx)
    return gm


def run_scheduled(rank: int) -> None:
    groups = Groups(init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    gm = program()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(spec(n).shape, generator=generator, dtype=torch.float64) for n in placeholders(gm)]
    pieces = [cut(x, spec(n), DP, groups.coords) for x, n in zip(inputs, placeholders(gm), strict=True)]
    bound = bind_program(gm, groups.mesh, groups.coords, groups)
    expected = on_one_device(build(step, DP, Stage.RESHARDED, **TYPES), inputs)
    for _ in range(2):
        found = bound(*pieces)
        for have, want, node in zip(found, expected, returned(gm), strict=True):
            torch.testing.assert_close(have, cut(want, spec(node), DP, groups.coords))


def test_the_program_holds_what_the_ranks_are_to_show():
    nodes = list(program().graph.nodes)
    started = [n.args[1] for n in nodes if n.target is c.start]
    assert sorted(started) == ["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]
    assert [len(n.args[0]) for n in nodes if n.target is c.start and n.args[1] == "all_reduce"] == [2]
    assert sum(n.target is c.wait for n in nodes) == 4


@on_ranks
def test_a_scheduled_program_gives_what_one_device_gives():
    run_ranks(run_scheduled, 2)
