"""Machines: presets, links of mesh dims, and what is refused."""

from __future__ import annotations

import pytest
from torch import nn

import shardc
from shardc import Hardware, Mesh, PlanError


def test_presets_by_name_and_none_is_neutral():
    assert Hardware.of("h100") is Hardware.preset("h100") and Hardware.of(None).name == "neutral"
    mine = Hardware("mine", 1e12, 1e11, 1e9)
    assert Hardware.of(mine) is mine


@pytest.mark.parametrize("given", ["h1000", 3, {"flops": 1}])
def test_what_is_no_machine_is_refused_before_any_work(given):
    with pytest.raises(PlanError, match="hardware"):
        shardc.compile(nn.Linear(2, 2), shardc.Replicated(), mesh=Mesh(dp=2), hardware=given)


WRONG = {
    "rates are positive": [
        {"flops": 0},
        {"memory": -1},
        {"links": {"a": 0.0}},
        {"flops": float("nan")},
        {"links": "1GB"},
    ],
    "has no flops": [{"flops": {}}],
    "has no links": [{"links": {}}],
    "its capacity is": [{"capacity": 0}, {"capacity": -80e9}],
    "times are numbers of seconds": [{"latency": -1e-6}, {"latency": {"dp": -1.0}}, {"launch": float("inf")}],
}


@pytest.mark.parametrize(("text", "wrong"), [(text, wrong) for text, several in WRONG.items() for wrong in several])
def test_a_machine_that_cannot_be_is_refused(text, wrong):
    with pytest.raises(PlanError, match=text):
        Hardware(**{"name": "mine", "flops": 1e12, "memory": 1e11, "links": 1e9, **wrong})


@pytest.mark.parametrize(("wrong", "what"), [({"links": {"tp": 1.0}}, "link"), ({"latency": {"tp": 1.0}}, "latency")])
def test_what_it_lacks_for_a_mesh_dim_is_said_before_any_work(wrong, what):
    machine = Hardware(**{"name": "mine", "flops": 1e12, "memory": 1e11, "links": 1e9, **wrong})
    mesh, plan = Mesh(dp=2, tp=2), shardc.Plan(dp=shardc.Replicated(), tp=shardc.Replicated())
    for work in (
        lambda: shardc.compile(nn.Linear(2, 2), plan, mesh=mesh, hardware=machine),
        lambda: shardc.search(nn.Linear(2, 2), mesh, None, hardware=machine),
    ):
        with pytest.raises(PlanError, match=f"hardware mine has no {what} for mesh dim dp"):
            work()


def test_a_call_takes_the_longer_of_its_operations_and_its_bytes_and_at_least_a_launch():
    machine = Hardware("mine", {"bf16": 100.0, "": 10.0}, 5.0, 1.0, launch=0.5)
    assert machine.call(100, 0, "bf16") == 1.0 and machine.call(100, 0, "f32") == 10.0
    assert machine.call(10, 100) == 20.0 and machine.call(0, 0) == 0.5


def test_mesh_dims_within_a_node_have_its_link_and_a_link_may_be_named_as_a_mesh_dim():
    machine, mesh = (
        Hardware("mine", 1.0, 1.0, {"fast": 100.0, "slow": 10.0}, latency={"dp": 2.0, "tp": 0.0}),
        Mesh(dp=4, tp=8),
    )
    assert [machine.link(mesh, dim) for dim in mesh] == [("slow", 10.0), ("fast", 100.0)]
    named = Hardware("mine", 1.0, 1.0, {"fast": 100.0, "dp": 7.0})
    assert [named.link(mesh, dim) for dim in mesh] == [("dp", 7.0), ("fast", 100.0)]
    assert machine.collective("all_gather", 30.0, mesh, "dp") == 3 * 2.0 + 3.0
    assert machine.collective("all_gather", 30.0, mesh, "tp") == 0.3
    with pytest.raises(PlanError, match="no link for mesh dim dp"):
        Hardware("mine", 1.0, 1.0, {"tp": 1.0}).link(mesh, "dp")
