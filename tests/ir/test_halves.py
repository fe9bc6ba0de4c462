"""One joint graph as forward and backward."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Interpreter

from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.halves import Halves, halves
from shardc.compiler.ir.signature import Output, OutputKind, Signature
from shardc.compiler.spec.mesh import Mesh
from tests.build import build, context, on_one_device, random_inputs

aten = torch.ops.aten
MESH = Mesh(dp=2)
TYPES = dict(x="f32[8, 4]", w="f32[4, 6]", tangent="f32[8, 6]")


def layer(x, w, tangent):
    h = aten.mm(x, w)
    y = aten.relu(h)
    grad_h = aten.threshold_backward(tangent, h, 0)
    return y, aten.mm(aten.t(x), grad_h), aten.mm(grad_h, aten.t(w))


def parts(fn=layer, gradients: tuple[str, ...] = ("w", "x"), recompute: dict[str, object] | None = None, types=TYPES):
    gm = build(fn, MESH, **types)
    for node in gm.graph.nodes:
        if node.name in (recompute or {}):
            node.meta["region"] = (recompute or {})[node.name]
    signature = context(gm, MESH, gradients).signature
    return gm, halves(gm, signature)


def calls(gm: GraphModule | None) -> list[str]:
    assert gm is not None
    return [n.name for n in gm.graph.nodes if n.op == "call_function"]


def inputs(gm: GraphModule | None) -> list[str]:
    assert gm is not None
    return [n.name for n in gm.graph.nodes if n.op == "placeholder"]


def run(found: Halves, given: list[torch.Tensor], results: int = 1) -> list:
    """Outputs and gradients, through what forward hands backward."""
    *state, tangent = given
    assert found.backward is not None
    first = list(Interpreter(found.forward).run(*state))
    return [*first[:results], *Interpreter(found.backward).run(*first[results:], tangent)]


def test_forward_returns_results_and_what_backward_needs():
    _, found = parts()
    assert found.saved == ("x", "w", "mm")
    assert (inputs(found.forward), calls(found.forward)) == (["x", "w"], ["mm", "relu"])
    assert [str(n) for n in returned(found.forward)] == ["relu", "x", "w", "mm"]


def test_backward_takes_what_was_saved_and_the_tangents():
    _, found = parts()
    assert inputs(found.backward) == ["x", "w", "mm", "tangent"]
    assert calls(found.backward) == ["threshold_backward", "t", "mm_1", "t_1", "mm_2"]


def test_the_halves_together_give_what_the_whole_gives():
    gm, found = parts()
    given = random_inputs(gm)
    for have, want in zip(run(found, given), on_one_device(gm, given), strict=True):
        assert torch.equal(have, want)


def test_without_tangents_there_is_no_backward():
    gm = build(lambda x, w: aten.mm(x, w), MESH, x="f32[8, 4]", w="f32[4, 6]")
    found = halves(gm, context(gm, MESH).signature)
    assert (found.backward, found.saved) == (None, ())


def test_names_layouts_and_sources_are_those_of_the_joint_graph():
    gm, found = parts()
    joint = {n.name: n.meta for n in gm.graph.nodes}
    assert found.backward is not None
    for half in (found.forward, found.backward):
        assert all(n.meta == joint[n.name] for n in half.graph.nodes if n.op != "output")


def test_a_gradient_may_be_missing():
    gm, _ = parts()
    end = gm.graph.output_node()
    end.args = ((end.args[0][0], None, end.args[0][2]),)  # pyright: ignore
    found = halves(gm, context(gm, MESH, ("w", "x")).signature)
    assert found.backward is not None
    assert [str(n) for n in returned(found.backward)] == ["None", "mm_2"]


# ---- recomputation


def test_what_is_recomputed_is_not_saved_but_made_before_its_first_use():
    gm, found = parts(recompute={"mm": "net", "relu": "net"})
    assert found.saved == ("x", "w")
    assert calls(found.backward) == ["mm", "threshold_backward", "t", "mm_1", "t_1", "mm_2"]
    given = random_inputs(gm)
    for have, want in zip(run(found, given), on_one_device(gm, given), strict=True):
        assert torch.equal(have, want)


def test_what_leaves_a_recomputed_region_is_saved():
    _, found = parts(recompute={"mm": "net"})  # relu, outside of it, uses mm
    assert found.saved == ("x", "w", "mm")


def test_random_draws_are_saved_though_marked():
    def fn(x, w, tangent):
        noise = aten.rand_like(x)
        return aten.mm(aten.mul(x, noise), w), aten.mm(aten.t(noise), tangent)

    _, found = parts(fn, ("w",), {"rand_like": "net", "mul": "net", "mm": "net"})
    assert found.saved == ("rand_like",)


def test_what_is_made_from_a_buffer_that_forward_changes_is_saved():
    def fn(x, w, tangent):
        scaled = aten.mul(w, 2)
        return aten.mm(x, scaled), aten.add(w, 1), aten.mm(tangent, aten.t(scaled))

    gm = build(fn, MESH, **TYPES)
    for node in gm.graph.nodes:
        node.meta["region"] = "net" if node.name in ("mul", "mm") else None
    plain = context(gm, MESH, ("x",)).signature
    first, _, last = plain.outputs
    changed = Output(None, OutputKind.MUTATION, "w", of=1)
    signature = Signature(plain.inputs, (first, changed, last), None, None, (), 0, (), {})
    assert halves(gm, signature).saved == ("mul",)


def test_results_of_a_call_are_saved_one_by_one():
    def fn(x, w, tangent):
        a, b = (aten.split_with_sizes(x, [1, 3], 1)[i] for i in range(2))
        return aten.mul(a, 2), aten.mul(b, aten.sum(tangent))

    _, found = parts(fn, ("w",))
    assert all("split" not in name for name in found.saved) and len(found.saved) == 1
