"""A dumped program says what the program itself says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardc.compiler.analysis.dump import SCHEMA
from shardc.tools import program_json
from shardc.tools.program_json import STAGES, explain, load, stage_text
from tests.tools.programs import program

PROGRAMS = {
    "replicated": lambda: program(),
    "fully sharded": lambda: program(sharded=True),
    "recomputed": lambda: program(recompute="layers.*"),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def both(request, tmp_path_factory):
    made = PROGRAMS[request.param]()
    path = tmp_path_factory.mktemp("dump") / "p.json"
    made.dump(path)
    return made, load(path)


def test_json_holds_exactly_what_data_gives(both):
    made, read = both
    again = made.data()
    assert json.loads(json.dumps(again)) == again == read


def test_collectives_are_the_programs(both):
    made, read = both
    assert [{**c._asdict(), "dtype": str(c.dtype)} for c in made.collectives()] == read["collectives"]
    moving = {n["name"] for n in read["nodes"] if n["moves"]}
    assert {c["name"] for c in read["collectives"]} <= moving


def test_the_peak_is_the_programs(both):
    made, read = both
    halves = read["memory"]["halves"]
    assert max(max(h["start"], *h["alive"]) for h in halves) == made.peak_bytes() == read["memory"]["peak_bytes"]


def test_what_is_alive_adds_up_at_every_step(both):
    for half in both[1]["memory"]["halves"]:
        for step, alive in enumerate(half["alive"]):
            assert alive == sum(size for _, size, begin, end in half["values"] if begin <= step <= end)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_replayed(both, stage: str):
    made, read = both
    assert stage_text(read, stage) == made.stage(stage)


def test_every_explanation_is_the_programs(both):
    made, read = both
    for name in read["reasons"]:
        whole = made.explain(name).split("\n")
        start = 2 if whole[1].startswith("  at ") else 1
        costs = [line for line in whole if line.startswith(("  chosen to cost", "  next best"))]
        assert explain(read, name).split("\n") == whole[start : len(whole) - len(costs)], name


def test_every_node_names_what_is_there(both):
    read = both[1]
    names = {n["name"] for n in read["nodes"]}
    for node in read["nodes"]:
        assert set(node["inputs"]) <= names
        assert not node["file"] or f"{node['file']}:{node['line']}" in read["sources"]
    assert {p["node"] for p in read["parameters"]} <= names


def test_source_lines_are_those_of_the_file(both):
    read = both[1]
    assert "return x + self.down(F.gelu(self.up(self.norm(x))))" in read["sources"].values()
    for place, text in read["sources"].items():
        file, _, line = place.rpartition(":")
        assert Path(file).read_text().splitlines()[int(line) - 1].strip() == text


def test_parameters_bring_their_plan_entry_and_bytes(both):
    made, read = both
    rows = {row["fqn"]: row for row in read["parameters"]}
    report = made.plan.report()
    assert {r["fqn"]: r["bytes_per_rank"] for r in report} == {f: r["bytes_per_rank"] for f, r in rows.items()}
    assert 'tp["layers.*.up"] = ColwiseParallel()' in rows["layers.0.up.weight"]["keys"]


def test_operations_are_counted_per_rank():
    nodes = {n["name"]: n for n in program().data()["nodes"]}
    (up,) = [n for n in nodes.values() if n["path"] == "layers.0.up" and n["phase"] == "forward" and n["flops"]]
    rows, width, features = 8 * 4 // 2, 16, 64 // 2  # dp halves the rows, tp the features
    assert up["flops"] == 2 * rows * width * features


def test_both_sides_agree_on_the_schema():
    assert program_json.SCHEMA == SCHEMA


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a program"),
        ("{}", "is not a program"),
        ('{"schema": "shardc.program/99"}', "has schema shardc.program/99, and this shardc reads shardc.program/1"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, what: str):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=what):
        load(path)


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="no value %nothing"):
        explain({"reasons": {}, "inputs": []}, "nothing")
