"""`shardc view`, `shardc explain` and `shardc plan`, as typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardc
from shardc.tools.cli import main
from shardc.tools.explain import folded, totals
from tests.tools.programs import program

TARGET = f"{Path(__file__).parent}/programs.py:target"
MESH = ("--mesh", "dp=2,tp=2")


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "p.json"
    program().dump(path)
    return path


def test_view_writes_page_dump_and_trace(tmp_path: Path, capsys):
    page, dump, trace = (tmp_path / name for name in ("g.html", "p.json", "t.json"))
    assert main(["view", TARGET, *MESH, "-o", str(page), "--dump", str(dump), "--trace", str(trace)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(dump.read_text())["schema"] == "shardc.program/1"
    assert json.loads(trace.read_text())["traceEvents"]
    again = tmp_path / "again.html"
    assert main(["view", str(dump), "-o", str(again)]) == 0
    assert again.stat().st_size > 100_000


def test_view_writes_a_graph_for_model_explorer(dumped: Path, tmp_path: Path):
    out = tmp_path / "m.json"
    assert main(["view", str(dumped), "-o", str(tmp_path / "g.html"), "--model-explorer", str(out)]) == 0
    data, (graph,) = json.loads(dumped.read_text()), json.loads(out.read_text())["graphs"]
    nodes = {n["id"]: n for n in graph["nodes"]}
    assert list(nodes) == [n["name"] for n in data["nodes"]]
    assert all(e["sourceNodeId"] in nodes for n in graph["nodes"] for e in n["incomingEdges"])
    moved = [n["label"] for n in graph["nodes"] if n["label"].startswith("all_reduce ")]
    assert len(moved) == len(data["collectives"])
    assert nodes["layers_0_up_weight"]["namespace"] == "forward/layers/0/up"


@pytest.mark.slow
def test_torch_trace_holds_every_pass(tmp_path: Path):
    """What tlparse reads; in a process of its own, as torch looks at TORCH_TRACE once."""
    env = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    command = [sys.executable, "-m", "shardc.tools.cli", "explain", TARGET, "mm", *MESH]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    (log,) = tmp_path.glob("*.log")
    lines = log.read_text().splitlines()
    names = [json.loads(line[line.index("{") :])["artifact"]["name"] for line in lines if '"name": "shardc_' in line]
    assert names[0] == "shardc_0_traced" and names[-1].endswith("_reduce-in-place")
    assert any("@tp" in line and "aten.mm" in line for line in lines if line.startswith("\t%"))


def test_view_compares_two(dumped: Path, tmp_path: Path):
    page = tmp_path / "g.html"
    assert main(["view", str(dumped), str(dumped), "-o", str(page)]) == 0
    assert page.stat().st_size > 100_000


def test_explain_prints_plan_collectives_memory_and_estimate(dumped: Path, capsys):
    assert main(["explain", str(dumped), "--links", "nvlink=450GB/s,ib=50GB/s"]) == 0
    said = capsys.readouterr().out
    data = json.loads(dumped.read_text())
    for text in ("layers.0.up.weight", "all_reduce tp x3", "layers.*.down", "exposed communication", "left out"):
        assert text in said
    assert f"{data['memory']['peak_bytes']:,}" in said
    assert f"{sum(c['bytes_on_wire'] for c in data['collectives']):,}" in said


def test_explain_json_has_the_programs_numbers(dumped: Path, capsys):
    assert main(["explain", str(dumped), "--json"]) == 0
    said, data = json.loads(capsys.readouterr().out), json.loads(dumped.read_text())
    assert said["collectives"] == data["collectives"]
    assert said["peak_bytes"] == data["memory"]["peak_bytes"] == said["memory"]["peak"]
    assert sum(t["bytes_on_wire"] for t in said["totals"]) == sum(c["bytes_on_wire"] for c in data["collectives"])
    assert 0 < said["estimate"]["exposed communication"] <= said["estimate"]["communication"]
    assert said["estimate"]["links"]["left_out"]


def test_explain_one_value(dumped: Path, capsys):
    assert main(["explain", str(dumped), "mm"]) == 0
    chain = capsys.readouterr().out
    assert main(["explain", TARGET, "mm", *MESH]) == 0
    assert chain.strip("\n") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["view", TARGET], "--mesh is missing: write --mesh dp=2,tp=4"),
        (["view", TARGET, "--mesh", "dp"], "write it as dp=2,tp=4"),
        (["view", "nothing", *MESH], "file.py:function, package.module:function, or the name of a dumped .json"),
        (["view", "no.json"], "no.json"),
        (["view", "a.json", "b.json", "c.json"], "one program is shown, or two are compared"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments: list[str], what: str, capsys, tmp_path: Path):
    assert main([*arguments, *(["-o", str(tmp_path / "g.html")])]) == 2
    assert what in capsys.readouterr().err


def test_an_unknown_value_is_an_error(dumped: Path, capsys):
    assert main(["explain", str(dumped), "nothing"]) == 2
    assert "no value %nothing in the program" in capsys.readouterr().err


def row(fqn: str, why: str = "", size: int = 8) -> dict:
    return {"kind": "all_reduce", "mesh_dim": "tp", "phase": "forward", "dtype": "torch.float32", "numel": 2,
            "bytes_on_wire": size, "fqn": fqn, "where": "m.py:1", "name": fqn, "why": why}  # fmt: skip


def test_numbered_modules_that_do_the_same_are_one_row():
    rows = [row(f"layers.{i}.up", f"%layers_{i}_up_weight is param layers.{i}.up.weight") for i in range(3)]
    ((alike, number),) = folded(rows)
    assert number == 3 and alike["fqn"] == "layers.*.up"
    assert alike["why"] == "%layers_*_up_weight is param layers.*.up.weight"


def test_rows_that_differ_in_more_stay_apart():
    assert [n for _, n in folded([row("layers.0"), row("layers.1", size=9), row("head")])] == [1, 1, 1]


def test_totals_are_by_kind_mesh_dim_and_phase():
    rows = [row("a"), row("b", size=4), {**row("c"), "phase": "backward"}]
    assert [(t["phase"], t["number"], t["bytes_on_wire"]) for t in totals({"collectives": rows})] == [
        ("forward", 2, 12),
        ("backward", 1, 8),
    ]


@pytest.mark.parametrize("target", ["on_meta", "deferred"])
def test_a_model_without_memory_is_looked_at(target: str, tmp_path: Path, capsys):
    file = TARGET.partition(":")[0]
    assert main(["view", f"{file}:{target}", "--mesh", "dp=4", "-o", str(tmp_path / "g.html")]) == 0
    capsys.readouterr()
    assert main(["explain", f"{file}:{target}", "--mesh", "dp=4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["memory"]["parameters"] > 2**38  # a quarter of each matrix


def test_plan_prints_a_plan_and_a_table(capsys):
    assert main(["plan", TARGET, "--mesh", "tp=2", "--hardware", "neutral", "--memory", "1GB"]) == 0
    plan, *table = capsys.readouterr().out.splitlines()
    assert plan.startswith("Plan(tp=") and any("memory of a rank" in line for line in table)
    assert main(["plan", TARGET, "--mesh", "tp=2", "--memory", "10 apples"]) == 2
    assert "memory is '10 apples'" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"shardc {shardc.__version__}\n"
