"""The estimate of one rank's timeline, against times worked out by hand."""

from __future__ import annotations

import json

import pytest

from shardc.compiler.spec.hardware import PRESETS, Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.tools.links import parse_links, parse_rate
from shardc.tools.timeline import chrome_trace, estimate
from tests.tools.programs import program

MESH = Mesh(dp=4, tp=2)
LINKS = Hardware("slow", 1e6, 1e3, {"wire": 100.0}, latency=1.0, launch=0.5)


def node(name: str, op: str = "aten.mm", *inputs: str, flops: int = 0, size: int = 0, **rest) -> dict:
    result = [{"dtype": "f32"}]
    return {"name": name, "op": op, "inputs": list(inputs), "results": result, "bytes": size, "flops": flops,
            "view": False, "type": "", "path": "", "where": "", "phase": "forward", "made_by": "", **rest}  # fmt: skip


def move(name: str, moved: int, kind: str = "all_reduce", dim: str = "tp") -> dict:
    return {"name": name, "kind": kind, "mesh_dim": dim, "bytes_on_wire": moved}


def data(nodes: list[dict], moves: list[dict] = ()) -> dict:  # pyright: ignore[reportArgumentType]
    half = {"phase": "forward", "order": [n["name"] for n in nodes], "start": 0, "alive": [], "values": []}
    mesh = [{"name": name, "size": MESH[name]} for name in MESH]
    return {"nodes": nodes, "collectives": list(moves), "mesh": mesh, "memory": {"halves": [half]}}


def test_an_operator_takes_the_longer_of_its_operations_and_its_bytes():
    busy = estimate(data([node("x", "input", size=1000), node("a", "aten.mm", "x", flops=4_000_000, size=1000)]), LINKS)
    assert busy.events == [("a", "compute", 0.0, 4.0)]
    full = estimate(data([node("x", "input", size=2000), node("a", "aten.mm", "x", flops=1_000_000, size=1000)]), LINKS)
    assert full.seconds == 3.0


def test_an_operator_takes_at_least_a_launch_and_a_view_nothing():
    nodes = [node("a", size=1), node("b", "aten.view", "a", size=1, view=True)]
    assert estimate(data(nodes), LINKS).seconds == 0.5


def test_a_collective_takes_its_steps_and_its_bytes_and_is_exposed():
    out = estimate(data([node("r", "shardc.all_reduce")], [move("r", 300)]), LINKS)
    assert out.events == [("r", "communication", 0.0, 2 * 1.0 + 3.0)]
    assert out.exposed == [("r", 0.0, 5.0)]
    gather = estimate(data([node("r", "shardc.all_gather")], [move("r", 300, "all_gather", "dp")]), LINKS)
    assert gather.seconds == 3 * 1.0 + 3.0


def test_a_part_of_a_mesh_dim_has_its_links_and_fewer_ranks():
    gather = estimate(data([node("r", "shardc.all_gather")], [move("r", 300, "all_gather", "dp/2")]), LINKS)
    assert gather.seconds == 1 * 1.0 + 3.0


def test_what_is_started_runs_beside_computation():
    nodes = [
        node("s", "shardc.start"),
        node("a", flops=4_000_000, size=1),
        node("w", "shardc.wait", "s"),
        node("b", flops=1_000_000, size=1),
    ]
    out = estimate(data(nodes, [move("s", 300)]), LINKS)
    assert out.events == [("s", "communication", 0.0, 5.0), ("a", "compute", 0.0, 4.0), ("b", "compute", 5.0, 6.0)]
    assert out.exposed == [("s", 4.0, 5.0)] and out.waiting == 1.0 and out.communication == 5.0


def test_collectives_share_the_wire_and_end_with_their_half():
    nodes = [node("s", "shardc.start"), node("t", "shardc.start")]
    out = estimate(data(nodes, [move("s", 300), move("t", 300)]), LINKS)
    assert [e[2:] for e in out.events] == [(0.0, 5.0), (5.0, 10.0)]
    assert out.seconds == 10.0 == out.waiting


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("nvlink=450GB/s,ib=50GB/s", {"dp": ("ib", 50e9), "tp": ("nvlink", 450e9)}),
        ("dp=10GB/s,tp=400Gb/s", {"dp": ("dp", 10e9), "tp": ("tp", 50e9)}),
        ("h100", {"dp": ("ib", 50e9), "tp": ("nvlink", 450e9)}),
        ("h200,ib=25GB/s", {"dp": ("ib", 25e9), "tp": ("nvlink", 450e9)}),
        ("wire=1MB/s", {"dp": ("wire", 1e6), "tp": ("wire", 1e6)}),
    ],
)
def test_links_carry_mesh_dims(text: str, dims: dict):
    """tp=8 fills a node, so dp goes over the last link."""
    mesh = Mesh(dp=64, tp=8)
    assert {dim: parse_links(text, mesh).link(mesh, dim) for dim in mesh} == dims


def test_a_mesh_within_one_node_uses_its_link_throughout():
    mesh = Mesh(dp=2, tp=4)
    assert parse_links("h100", mesh).link(mesh, "dp") == ("nvlink", 450e9)


@pytest.mark.parametrize("text", ["x100", "nvlink=fast", "nvlink=450", "nvlink=0GB/s", "nvlink=-1GB/s"])
def test_other_links_are_refused(text: str):
    with pytest.raises(ValueError, match="--links|no hardware"):
        parse_links(text, MESH)


def test_bits_are_not_bytes():
    assert parse_rate("400Gb/s") == parse_rate("50GB/s") == 50e9


def test_every_preset_says_where_its_numbers_come_from():
    assert all("data sheet" in machine.source for name, machine in PRESETS.items() if name != "neutral")


@pytest.fixture(scope="module")
def real() -> dict:
    return program(sharded=True).data()


def test_slower_links_never_make_a_step_shorter(real: dict):
    fast, slow = (estimate(real, parse_links(text, Mesh(dp=2, tp=2))) for text in ("wire=1GB/s", "wire=1MB/s"))
    assert fast.seconds < slow.seconds and fast.waiting < slow.waiting
    assert len([e for e in slow.events if e[1] == "communication"]) == len(real["collectives"])


def test_the_estimate_is_a_schedule(real: dict):
    """On each stream one thing at a time; computation and exposed waits together fill the step."""
    out = estimate(real, parse_links("wire=1MB/s", Mesh(dp=2, tp=2)))
    for stream in ("compute", "communication"):
        times = [e[2:] for e in out.events if e[1] == stream]
        assert all(a[1] <= b[0] + 1e-12 for a, b in zip(times, times[1:], strict=False))
    busy = sum(end - begin for _, stream, begin, end in out.events if stream == "compute")
    assert busy + out.waiting == pytest.approx(out.seconds)


def test_the_trace_is_what_perfetto_reads(real: dict):
    out = estimate(real, parse_links("h100", Mesh(dp=2, tp=2)))
    trace = json.loads(json.dumps(chrome_trace(real, out)))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["ph"] for e in trace["traceEvents"]} == {"X", "M"}
    assert all({"name", "ts", "dur", "pid", "tid", "cat"} <= set(e) and e["dur"] >= 0 for e in events)
    assert trace["distributedInfo"] == {"rank": 0, "world_size": 4}
    moved = sorted(e["args"]["bytes_on_wire"] for e in events if "bytes_on_wire" in e["args"])
    assert moved == sorted(c["bytes_on_wire"] for c in real["collectives"])
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {"rank 0 (estimated)", "compute", "communication", "exposed"}
