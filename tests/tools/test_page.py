"""What the page is made of, without a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shardc.tools.page import page
from tests.browser.synthetic import synthetic

ROOT = Path(__file__).parents[2]
VIEWER = ROOT / "tools/viewer"


@pytest.fixture(scope="module")
def html() -> str:
    return page(synthetic(2, 60), titles=["<b>"])


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_policy_lets_only_the_viewers_own_script_and_style_run(html: str):
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', html)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == " ".join(f"'{digest(s)}'" for s in scripts)
    assert rules["style-src"] == " ".join(f"'{digest(s)}'" for s in styles)


def test_nothing_is_asked_of_the_network(html: str):
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", html)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|importScripts)\(", html)


def test_the_data_is_text_to_the_browser(html: str):
    (data,) = re.findall(r'<script type="application/octet-stream" id="data">(.*?)</script>', html, re.DOTALL)
    (part,) = json.loads(gzip.decompress(base64.b64decode(data)))
    assert part["title"] == "<b>" and "<title>&lt;b&gt;</title>" in html
    assert part["program"]["schema"] == "shardc.program/1"


def test_a_page_is_the_same_each_time(html: str):
    assert page(synthetic(2, 60), titles=["<b>"]) == html


def test_the_script_puts_no_data_into_html():
    for path in (VIEWER / "src").glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", path.read_text()), path


def test_licences_of_what_the_script_contains_are_there():
    text = (ROOT / "tools/static/LICENSES.txt").read_text()
    for name in json.loads((VIEWER / "package.json").read_text())["dependencies"]:
        assert name in text
    assert text.count("Permission is hereby granted") == text.count("inside viewer.js")


def node(*arguments: str | Path, input: str = "") -> str:
    if shutil.which("node") is None:
        pytest.skip("node is not installed; it is needed only to change the viewer")
    done = subprocess.run(["node", *map(str, arguments)], input=input, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_bundle_is_what_its_source_builds(tmp_path: Path):
    if not (VIEWER / "node_modules/esbuild").exists():
        pytest.skip("run `npm ci` in tools/viewer to build the viewer")
    node(VIEWER / "build.mjs", tmp_path)
    built = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert built == {path.name: path.read_bytes() for path in (ROOT / "tools/static").iterdir()}


def test_what_was_packed_is_unpacked(tmp_path: Path):
    from shardc.tools.pack import pack

    data = synthetic(3, 200)
    script = tmp_path / "unpack.mjs"
    source = (VIEWER / "src/unpack.js").as_uri()
    script.write_text(
        f"import {{ unpack }} from {json.dumps(source)};\n"
        "let text = ''; for await (const piece of process.stdin) text += piece;\n"
        "console.log(JSON.stringify(unpack(JSON.parse(text))));\n"
    )
    assert json.loads(node(script, input=json.dumps(pack(data)))) == json.loads(json.dumps(data))
