"""The viewer's page in a real browser, with the network cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import shardc
from shardc.compiler.analysis.program import Program
from shardc.tools.page import page
from tests.browser.chromium import Chromium
from tests.browser.synthetic import synthetic
from tests.tools.programs import program

APP = "shardcView.app"


@pytest.fixture(scope="module")
def shown() -> Program:
    return program()


@pytest.fixture(scope="module")
def data(shown: Program) -> dict:
    return shown.data()


@pytest.fixture(scope="module")
def file(shown: Program, tmp_path_factory) -> Path:
    """The page of one program, to be compared with another that is sharded over dp too."""
    path = tmp_path_factory.mktemp("page") / "graph.html"
    shown.view(path, compare=program(sharded=True), title="Net")
    return path


@pytest.fixture
def view(browser: Chromium, file: Path) -> Chromium:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(file)
    yield browser
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


def text(view: Chromium, selector: str) -> str:
    return view.js(f"document.querySelector({json.dumps(selector)}).innerText")


def cells(view: Chromium, table: str) -> list[list[str]]:
    rows = f"[...document.querySelectorAll({json.dumps(table + ' tbody tr')})]"
    return view.js(f"{rows}.map(r => [...r.cells].map(c => c.innerText))")


def middle(view: Chromium, key: str) -> tuple[float, float]:
    """Where on the page the middle of a box's upper part is."""
    place = f"""(() => {{
        const g = {APP}.graph, b = g.scene.byKey.get({json.dumps(key)}), r = g.canvas.getBoundingClientRect();
        return [r.x + g.place.x + (b.x + b.w / 2) * g.place.scale, r.y + g.place.y + (b.y + 12) * g.place.scale];
    }})()"""
    x, y = view.js(place)
    return x, y


def search(view: Chromium, words: str) -> list[str]:
    view.js("document.getElementById('search').focus(); document.getElementById('search').value = ''")
    view.type(words)
    view.until(f"{APP}.search.text === {json.dumps(words)}")
    return view.js(f"{APP}.search.found.map(n => n.name)")


def test_the_browser_reports_what_goes_wrong(browser: Chromium, tmp_path: Path):
    """Else the other tests could not fail for it."""
    path = tmp_path / "bad.html"
    path.write_text("<script>fetch('https://example.org/x').catch(() => {}); setTimeout(() => nothing())</script>")
    browser.errors.clear()
    browser.open(path, wait="document.readyState === 'complete'")
    browser.js("new Promise(done => setTimeout(done, 200))")
    assert any("nothing is not defined" in e for e in browser.errors)
    assert "https://example.org/x" in browser.requests


def test_opens_with_no_network(view: Chromium, file: Path):
    assert view.requests[0] == file.as_uri()
    assert view.js("navigator.onLine") is False
    assert text(view, "#name") == "Net"
    assert "Content-Security-Policy" in view.js("document.head.innerHTML")


def test_the_page_holds_the_whole_program(view: Chromium, data: dict):
    read = json.loads(view.js(f"JSON.stringify({APP}.program.data)"))
    assert read == json.loads(json.dumps(data))


def test_layers_are_one_box_with_a_count(view: Chromium):
    labels = view.js("[...document.querySelectorAll('[role=treeitem]')].map(r => r.getAttribute('aria-label'))")
    assert any(label.startswith("0 … 2  ×3") for label in labels)
    assert not any(label.startswith("layers.1") for label in labels)


def test_search_finds_every_collective(view: Chromium, shown: Program):
    assert search(view, "collective") == [c.name for c in shown.collectives()]
    for kind, dim in {(c.kind, c.mesh_dim) for c in shown.collectives()}:
        wanted = [c.name for c in shown.collectives() if (c.kind, c.mesh_dim) == (kind, dim)]
        assert search(view, f"collective:{kind} dim:{dim}") == wanted


def test_search_finds_collectives_that_move_twice(browser: Chromium, tmp_path: Path):
    """What backward computes again is one value with two rows."""
    data = synthetic(2, 100)
    first, *rest = data["collectives"]
    data["collectives"] = [first, *rest, {**first, "phase": "backward"}]
    path = tmp_path / "again.html"
    path.write_text(page(data), encoding="utf-8")
    browser.open(path)
    assert search(browser, "collective") == [c["name"] for c in (first, *rest)]
    browser.js(f"{APP}.reveal({json.dumps(first['name'])})")
    assert "backward computes this again" in text(browser, "#details")
    assert browser.js(f"{APP}.now.byName.get({json.dumps(first['name'])}).collective.phase") == "forward"


@pytest.mark.parametrize("words", ["gelu", "layers.1.up", "op:aten.mm", "layout:@tp", "/^mm_\\d$/", "path:head"])
def test_search_finds_by(view: Chromium, words: str, data: dict):
    found = search(view, words)
    assert found and len(found) < len(data["nodes"])
    assert text(view, "#found") == f"{len(found)} of {len(data['nodes'])}"


def test_opens_to_a_value_and_a_click_shows_its_source(view: Chromium, shown: Program, data: dict):
    move = next(c for c in shown.collectives() if c.fqn == "layers.1.down")
    node = next(n for n in data["nodes"] if n["name"] == move.name)
    view.js(f"{APP}.reveal({json.dumps(move.name)}); {APP}.graph.select(null)")
    assert move.name not in text(view, "#details")
    view.click(*middle(view, move.name))
    said = text(view, "#details")
    place = f"{node['file']}:{node['line']}"
    assert place in said and data["sources"][place] in said
    assert f"{move.bytes_on_wire:,} per rank" in said and move.why in said and "lower-reshards" in said
    assert all(f"%{name}" in said for name in node["inputs"])
    assert view.js("location.hash") == f"#{move.name}"


def test_the_chain_of_rules_is_the_programs(view: Chromium, shown: Program, data: dict):
    for name in [n["name"] for n in data["nodes"] if n["op"] == "aten.mm"]:
        steps = view.js(f"{APP}.program.explain({json.dumps(name)})")
        lines = []
        for chain in steps:
            lines.append(f"  {chain['axis']}:")
            lines += [f"    %{s['name']} {s['text']}" if s["name"] else "    ..." for s in chain["steps"]]
        assert "\n".join(lines) in shown.explain(name)


def test_the_collectives_table_is_the_programs(view: Chromium, shown: Program):
    view.js("document.getElementById('tab-collectives').click()")
    rows = [
        [f"%{c.name}", c.kind, c.mesh_dim, c.phase, str(c.dtype)[6:], f"{c.numel:,}", f"{c.bytes_on_wire:,}",
         c.fqn, c.where, c.why]
        for c in shown.collectives()
    ]  # fmt: skip
    assert cells(view, "#collectives") == rows
    totals = {(row[0], row[1].strip(), row[2]): (row[3], row[4]) for row in cells(view, "#totals")}
    for key in {(c.kind, c.mesh_dim, c.phase) for c in shown.collectives()}:
        same = [c for c in shown.collectives() if (c.kind, c.mesh_dim, c.phase) == key]
        assert totals[key] == (f"{len(same)}", f"{sum(c.bytes_on_wire for c in same):,}")
    view.js("document.querySelectorAll('#collectives th button')[6].click()")
    assert [r[6] for r in cells(view, "#collectives")] == sorted((r[6] for r in rows), key=_number, reverse=True)


def _number(shown: str) -> int:
    return int(shown.replace(",", ""))


def test_the_peak_is_the_programs(view: Chromium, shown: Program):
    assert text(view, "#peak") == f"{shown.peak_bytes():,}"
    view.js("document.getElementById('tab-memory').click()")
    assert text(view, "#panel .peak") == f"{shown.peak_bytes():,}"
    view.js("document.querySelector('#panel .more')?.click()")  # at first the largest values only
    alive = [int(row[1].replace(",", "")) for row in cells(view, "#panel")]
    assert sum(alive) == shown.peak_bytes()


def test_the_curve_falls_when_what_a_half_found_there_is_freed(browser: Chromium, tmp_path: Path):
    """Backward is long here, and most of what it starts with is freed before the end."""
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 512))
    lowered = shardc.compile(model, shardc.Replicated(), mesh=shardc.Mesh(dp=2)).lower(torch.zeros(1024, 64))
    lowered.view(tmp_path / "deep.html")
    browser.open(tmp_path / "deep.html")
    halves = lowered.data()["memory"]["halves"]
    assert browser.js(f"{APP}.program.data.memory.halves.map(h => h.alive)") == [half["alive"] for half in halves]
    browser.js("document.getElementById('tab-memory').click()")
    assert text(browser, "#panel .peak") == text(browser, "#peak") == f"{lowered.peak_bytes():,}"


def test_every_stage_is_the_programs(view: Chromium, shown: Program):
    for k, record in enumerate(shown.records):
        lines = view.js(f"[...{APP}.lines({k + 1})]")
        said = [f"return {it[1]}" if name == "return" else f"%{name}: {it[0]} = {it[1]}" for name, it, *_ in lines]
        assert "\n".join(said) == record.after.split("\n", 1)[1]


def test_the_slider_shows_what_a_pass_changed(view: Chromium, shown: Program):
    step = next(i for i, r in enumerate(shown.records) if r.name == "lower-reshards")
    view.js(f"const s = document.getElementById('stage'); s.value = {step + 1}; s.dispatchEvent(new Event('input'))")
    view.js("document.getElementById('tab-passes').click()")
    assert "lower-reshards" in text(view, "#stage-name")
    assert sum(c in shown.records[step].after for c in [row[1] for row in cells(view, "#panel")]) > 0
    view.js("s.value = 0; s.dispatchEvent(new Event('input'))")
    assert "TRACED" in text(view, "#stage-name")
    assert view.js(f"{APP}.now.nodes.every(n => n.layout.split.length === 0)") is True
    assert search(view, "collective") == []


def test_two_plans_are_compared(view: Chromium, shown: Program):
    """The other plan is FullyShard over dp: its parameters are split, gathered, and reduce-scattered."""
    view.js("document.getElementById('tab-compare').click()")
    moved = cells(view, "#moves-differ")
    assert any(row[:3] == ["all_gather", "dp", "forward"] and row[4] == "0: 0 B" != row[5] for row in moved)
    assert {row[0] for row in moved} >= {"all_gather", "reduce_scatter", "all_reduce"}
    laid = {row[0]: row for row in cells(view, "#values-differ")}
    weight = laid["%layers_0_up_weight"]
    assert "@tp" in weight[3] and "dp" not in weight[3] and "dp" in weight[4]
    assert f"{shown.peak_bytes():,}" in text(view, "#panel")


def test_a_dump_is_opened_from_a_file(view: Chromium, tmp_path: Path):
    path = tmp_path / "other.json"
    program(sharded=True).dump(path)
    view.js("document.getElementById('tab-compare').click()")
    root = view.call("DOM.getDocument")["root"]["nodeId"]
    field = view.call("DOM.querySelector", nodeId=root, selector="#panel input[type=file]")["nodeId"]
    view.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])
    view.until("document.querySelector('#panel').innerText.includes('other.json')")
    assert cells(view, "#moves-differ")


def test_the_timeline_marks_exposed_communication(view: Chromium):
    view.js("document.getElementById('tab-timeline').click()")
    said = text(view, "#panel")
    assert "Estimated step" in said and "of which exposed" in said and "What this leaves out" in said
    assert view.js(f"{APP}.program.timeline.waits.length") > 0


def test_by_keyboard_alone(view: Chromium):
    view.js("document.querySelector('[role=treeitem]').focus()")
    for _ in range(3):
        view.key("ArrowDown")
    view.key("Enter", "\r")
    before = view.js("document.querySelector('[aria-selected=true][role=treeitem]').getAttribute('aria-label')")
    assert before
    view.js("document.getElementById('graph').focus()")
    view.key("ArrowDown")
    assert view.js("document.querySelector('[aria-selected=true][role=treeitem]').getAttribute('aria-label')") != before
    view.key("/")
    assert view.js("document.activeElement.id") == "search"


def test_everything_has_a_name_for_screen_readers(view: Chromium):
    nodes = view.call("Accessibility.getFullAXTree")["nodes"]
    asked = {"button", "slider", "searchbox", "tab", "tree", "treeitem", "application", "combobox"}
    roles = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n.get("ignored")]
    assert all(name for role, name in roles if role in asked)
    assert asked - {"combobox"} <= {role for role, _ in roles}


def test_the_picture_is_exported(view: Chromium):
    svg = ElementTree.fromstring(view.js(f"{APP}.graph.svg()"))
    words = [e.text for e in svg.iter() if e.tag.endswith("text")]
    assert any("×3" in w for w in words)
    assert view.js("document.getElementById('graph').toDataURL().length") > 5000


HOSTILE = """</script><script>globalThis.pwned=1</script><img src=x onerror='globalThis.pwned=1'>"&'日本"""


def test_hostile_names_are_text(browser: Chromium, tmp_path: Path):
    browser.errors.clear()
    data = synthetic(2, 200, names=(HOSTILE.replace(".", "_"), HOSTILE))
    data["nodes"][3]["op"] = data["nodes"][3]["args"] = data["nodes"][3]["made_by"] = HOSTILE
    data["plan"]["warnings"] = data["notes"] = [HOSTILE]
    path = tmp_path / "hostile.html"
    path.write_text(page(data, titles=[HOSTILE]), encoding="utf-8")
    browser.open(path)
    for name in ("collectives", "parameters", "memory", "timeline", "passes", "compare"):
        browser.js(f"{APP}.panel('{name}')")
    for i in (0, 3, 20):
        browser.js(f"{APP}.reveal({APP}.now.nodes[{i}].name)")
    browser.js(f"{APP}.goto(1); {APP}.goto(0)")
    assert browser.js("globalThis.pwned") is None
    assert browser.js("document.querySelectorAll('img, body script:not(:last-of-type)').length") == 0
    assert text(browser, "#name").strip() == HOSTILE == browser.js("document.title")
    ElementTree.fromstring(browser.js(f"{APP}.graph.svg()"))
    assert browser.errors == []


def test_a_large_program(browser: Chromium, tmp_path: Path):
    """96 layers, 50,000 values: few boxes at first sight, and each step quick enough for a person."""
    path = tmp_path / "large.html"
    path.write_text(page(synthetic(96, 52_000)), encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    browser.errors.clear()
    browser.open(path)
    assert browser.js(f"{APP}.now.nodes.length") > 50_000
    assert browser.js(f"{APP}.graph.scene.boxes.length") < 200
    browser.js(f"{APP}.reveal({APP}.now.nodes.find(n => n.path.startsWith('layers.50.mlp')).name)")
    assert browser.js(f"{APP}.graph.scene.boxes.length") < 400
    assert len(browser.js("shardcView.find('collective')")) == 4 * 96
    assert browser.errors == []


def test_a_program_without_modules_is_cut_into_parts(browser: Chromium, tmp_path: Path):
    data = synthetic(20, 6_000)
    for node in data["nodes"]:
        node["path"] = ""
    path = tmp_path / "flat.html"
    path.write_text(page(data), encoding="utf-8")
    browser.errors.clear()
    browser.open(path)
    assert browser.js(f"{APP}.graph.scene.boxes.length") < 200
    name = data["nodes"][4_000]["name"]
    browser.js(f"{APP}.reveal({json.dumps(name)})")
    assert browser.js(f"{APP}.graph.boxOf({APP}.graph.picked).item.key") == name
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pictures(browser: Chromium, file: Path, tmp_path: Path, dark: bool):
    """Kept in $SHARDC_PICTURES, to be looked at."""
    folder = Path(os.environ.get("SHARDC_PICTURES", tmp_path))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.call("Emulation.setEmulatedMedia", features=[scheme])
    browser.open(file)
    for name in ("collectives", "memory", "timeline", "compare"):
        browser.js(f"{APP}.panel('{name}'); new Promise(done => setTimeout(done, 100))")
        picture = folder / f"{name}-{'dark' if dark else 'light'}.png"
        browser.screenshot(picture)
        assert picture.stat().st_size > 20_000
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) is dark
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
