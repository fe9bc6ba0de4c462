"""What passes/canonicalize.py passes on; what it makes stands in canonicalize.txt."""

from __future__ import annotations

import torch

from shardc.compiler.spec.mesh import Mesh
from shardc.passes.layouts.canonicalize import Canonicalize
from tests.build import apply, build, context

aten = torch.ops.aten


def test_the_parts_keep_where_the_whole_came_from():
    gm = build(lambda bias, x, w: aten.addmm(bias, x, w), Mesh(tp=2), bias="f32[16]", x="f32[8, 4]", w="f32[4, 16]")
    node = next(n for n in gm.graph.nodes if n.target is aten.addmm.default)
    node.meta |= {"where": "mlp.py:3 in forward", "path": "layers.0"}
    apply(Canonicalize(), gm, context(gm, Mesh(tp=2)))
    made = [n for n in gm.graph.nodes if n.op == "call_function"][:2]
    kept = {(n.meta["where"], n.meta["path"], n.meta["phase"]) for n in made}
    assert kept == {("mlp.py:3 in forward", "layers.0", "forward")}
