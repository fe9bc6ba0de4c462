"""The compiled program itself: cases 111, 112, 114 and 115."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput
from torch.fx.traceback import annotate

import shardc
from shardc import Mesh
from tests.acceptance.compare import backward, compare, counts, forward, wire_bytes
from tests.acceptance.models import MLP, MLP_TP, Deep

ANY = {"": PrepareModuleInput()}  # a plan that says nothing, and so is not empty


class Relayout(nn.Module):
    def __init__(self, target: Placement) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return shardc.constrain(x, self.target)


RELAYOUTS = {
    "S to R": (Shard(0), Replicate(), forward("all_gather")),
    "P to R": (Partial(), Replicate(), forward("all_reduce")),
    "P to S": (Partial(), Shard(0), forward("reduce_scatter") | backward("all_gather")),
    "R to S": (Replicate(), Shard(0), backward("all_gather")),
    "R to P": (Replicate(), Partial(), {}),
    "S(0) to S(1)": (Shard(0), Shard(1), forward("all_to_all") | backward("all_to_all")),
    "S(1) to S(0)": (Shard(1), Shard(0), forward("all_to_all") | backward("all_to_all")),
}
SORTS = [
    (torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.complex64, 2),
]  # fmt: skip


@pytest.mark.parametrize("name", RELAYOUTS)
@pytest.mark.parametrize("w", [2, 4])
def test_a_relayout_is_one_collective_and_its_backward_the_transpose(name: str, w: int):
    """Case 111. Nothing is computed, so nothing may change: equal to the last bit."""
    source, target, expected = RELAYOUTS[name]
    for dtype, extra in SORTS:
        x = torch.randn(3 * w + extra, 2 * w + extra, dtype=dtype)
        program = compare(
            Relayout(target), ANY, Mesh(tp=w), x,
            inputs=source, outputs=target, close={"rtol": 0, "atol": 0},
        )  # fmt: skip
        assert counts(program) == expected, dtype


def test_bytes_of_a_relayout_are_those_of_a_ring():
    """Case 111: n ranks, n - 1 of n parts on the wire, uneven pieces padded to the largest."""
    x = torch.randn(13, 8)
    wires = {}
    for name, (source, target, _) in RELAYOUTS.items():
        compiled = shardc.compile(Relayout(target), ANY, mesh=Mesh(tp=4), inputs=source, outputs=target)
        with torch.no_grad():
            wires[name] = wire_bytes(compiled.lower(x))
    assert wires == {
        "S to R": 3 * 4 * 8 * 4,
        "P to R": 2 * 3 * 13 * 8 * 4 // 4,
        "P to S": 3 * 4 * 8 * 4,
        "R to S": 0,
        "R to P": 0,
        "S(0) to S(1)": 3 * 4 * 2 * 4,
        "S(1) to S(0)": 3 * 4 * 2 * 4,
    }


def test_two_mlps_are_three_all_reduces():
    """Case 112: two forward, and one backward where the input needs no gradient."""
    plan = {f"layers.*.{name}": style for name, style in MLP_TP.items()}
    program = compare(Deep(2), plan, Mesh(tp=4), torch.randn(8, 16), grads=False)
    assert counts(program) == forward("all_reduce", 2) | backward("all_reduce", 1)


# --- recompilation


def test_a_call_like_one_before_compiles_nothing():
    """Case 114."""
    compiled = shardc.compile(MLP(), MLP_TP, mesh=Mesh(tp=2))
    for rows in (8, 8, 8, 6, 8, 6):
        compiled(torch.randn(rows, 16)).sum().backward()
    assert len(compiled.programs) == 2
    compiled(torch.randn(16, 8).t())
    assert len(compiled.programs) == 2  # strides are no part of it


def test_whatever_changes_the_program_compiles_exactly_one_more():
    """Case 114."""
    compiled = shardc.compile(MLP(), MLP_TP, mesh=Mesh(tp=2))
    x = torch.randn(8, 16)
    calls = [
        lambda: compiled(x),
        lambda: compiled(x[:4]),
        lambda: compiled(x.clone().requires_grad_()),
        lambda: compiled.eval()(x),
        lambda: torch.no_grad()(compiled)(x),
    ]
    for n, call in enumerate(calls, 1):
        call()
        call()
        assert len(compiled.programs) == n


def test_a_batch_marked_dynamic_compiles_once():
    """Case 114."""
    compiled = shardc.compile(MLP(), MLP_TP, mesh=Mesh(tp=2), dynamic=True)
    for rows in (8, 6, 12):
        compiled(torch.randn(rows, 16))
    assert len(compiled.programs) == 1


# --- annotations


class Annotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        with annotate({"region": "one"}):
            x = self.first(x)
        with annotate({"region": "two"}):
            return self.second(x)


def test_annotations_of_a_region_are_on_its_nodes_and_collectives():
    """Case 115."""
    plan = {f"{m}.{name}": style for m in ("first", "second") for name, style in MLP_TP.items()}
    compiled = shardc.compile(Annotated(), plan, mesh=Mesh(tp=2))
    program = compiled.lower(torch.randn(8, 16, requires_grad=True))
    found: dict[tuple[str, str, bool], set[str]] = {}
    moved = {c.name for c in program.collectives()}
    for node in program.gm.graph.nodes:
        if node.op == "call_function":
            region = node.meta.get("custom", {}).get("region", "")
            place = node.meta["path"].split(".")[0]
            found.setdefault((place, node.meta["phase"], node.name in moved), set()).add(region)
    for place, region in (("first", "one"), ("second", "two")):
        for phase in ("forward", "backward"):
            for collective in (False, True):
                assert found[place, phase, collective] == {region}, (place, phase, collective)


def test_every_call_knows_its_module_phase_and_line():
    """Case 115, for what needs no annotation."""
    program = shardc.compile(MLP(), MLP_TP, mesh=Mesh(tp=2)).lower(torch.randn(8, 16, requires_grad=True))
    for node in program.gm.graph.nodes:
        if node.op == "call_function":
            assert node.meta["phase"] in ("forward", "backward"), node
            assert "models.py:" in node.meta["where"], node
    fqns = [(c.fqn, c.phase) for c in program.collectives()]
    assert fqns == [("net2", "forward"), ("net1", "backward")]
