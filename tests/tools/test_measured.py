"""A profiler's trace is put onto the values of the program that ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import shardc
from shardc.tools.cli import main
from shardc.tools.measured import join, load_trace
from tests.tools.programs import Net, plan


def move(op: str) -> str:
    return op[7:] if op == "shardc.all_reduce" else ""


def data(*ops: str) -> dict:
    nodes = [{"name": f"v{i}", "op": op, "moves": move(op)} for i, op in enumerate(ops)]
    moves = [{"name": n["name"]} for n in nodes if n["moves"]]
    return {"nodes": nodes, "collectives": moves, "memory": {"halves": [{"order": [n["name"] for n in nodes]}]}}


def trace(*names: str) -> dict:
    events = [{"ph": "X", "cat": "cpu_op", "name": n, "ts": 10.0 * i, "dur": 4.0} for i, n in enumerate(names)]
    return {"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}


def test_operators_are_matched_in_order_with_others_between():
    out = join(
        data("input", "aten.mm", "aten.add.Tensor", "shardc.all_reduce", "getitem", "aten.mm"),
        trace("aten::empty", "aten::mm", "aten::copy_", "aten::add", "c10d::allreduce_", "aten::mm"),
    )
    assert out["matched"] == out["expected"] == 4
    assert out["events"] == [
        ["v1", "compute", 0, 4000],
        ["v2", "compute", 20000, 24000],
        ["v3", "communication", 30000, 34000],
        ["v5", "compute", 40000, 44000],
    ]


def test_of_several_steps_the_last_is_taken():
    out = join(
        data("aten.mm", "aten.add.Tensor"), trace("aten::mm", "aten::add", "aten::zero_", "aten::mm", "aten::add")
    )
    assert [row[2] for row in out["events"]] == [0, 10000]


def test_a_trace_of_something_else_is_refused():
    with pytest.raises(ValueError, match="1 of 3 operators"):
        join(data("aten.mm", "aten.add.Tensor", "aten.mul.Tensor"), trace("aten::mm", "aten::relu"))
    with pytest.raises(ValueError, match="not of this program"):
        join(data("aten.mm"), trace("aten::add"))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_another_file_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a trace"):
        load_trace(path)


def profiled(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = shardc.compile(Net(), plan(), mesh=mesh)
    ids = torch.zeros(4, 4, dtype=torch.long)
    model(ids).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(ids).sum().backward()
        model(ids).sum().backward()
    if rank == 0:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        model.programs[-1].dump(f"{folder}/program.json")


@pytest.mark.ranks
def test_a_step_on_real_ranks_is_found_in_its_trace(tmp_path: Path):
    shardc.launch(profiled, 2, (str(tmp_path),))
    read = json.loads((tmp_path / "program.json").read_text())
    out = join(read, load_trace(tmp_path / "trace.json"))
    assert out["matched"] >= 0.95 * out["expected"]
    found = {row[0]: row for row in out["events"]}
    assert {c["name"] for c in read["collectives"]} <= set(found)
    begins = [row[2] for row in out["events"]]
    assert begins == sorted(begins)
    page = tmp_path / "g.html"
    command = ["view", str(tmp_path / "program.json"), "--measured", str(tmp_path / "trace.json"), "-o", str(page)]
    assert main(command) == 0 and page.stat().st_size > 100_000
