"""How the viewer's page behaves with a program of 96 layers and 50,000 values: sizes and times, best of a few runs.

    .venv/bin/python -m benchmarks.viewer

The program is made up (tests/browser/synthetic.py); the browser is that of `make test-browser`, headless.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from shardc.tools.page import page
from tests.browser.chromium import Chromium
from tests.browser.synthetic import synthetic

RUNS = 3
GROUPS = [
    f"{half}.{module}" for half in ("forward/layers.0", "backward/layers.95") for module in ("attention.q", "mlp.up")
]
TOGGLE = """(() => {{
    const graph = shardcView.app.graph, item = {item}, begin = performance.now();
    graph.toggle(item, {want});
    graph.paint();
    return performance.now() - begin;
}})()"""
PAN = """(async () => {
    const graph = shardcView.app.graph;
    graph.place.scale = 0.5;
    const begin = performance.now();
    for (let i = 0; i < 60; i++) {
        graph.moveBy(i % 2 ? -3 : 3, -2);
        await new Promise(requestAnimationFrame);
    }
    return (performance.now() - begin) / 60;
})()"""


def main() -> None:
    data = synthetic(96, 52_000)
    begin = time.perf_counter()
    text = page(data)
    print(f"{len(data['nodes']):,} values; page of {len(text):,} bytes made in {time.perf_counter() - begin:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(text, encoding="utf-8")
        runs = [run(path) for _ in range(RUNS)]
    for name in runs[0]:
        values = [r[name] for r in runs]
        print(f"{name}: best {min(values):.0f}, worst {max(values):.0f}")


def run(path: Path) -> dict[str, float]:
    """Milliseconds, and the number of boxes, of one opening."""
    with Chromium() as browser:
        browser.open(path)
        out = {
            "boxes at first sight": browser.js("shardcView.app.graph.scene.boxes.length"),
            "first paint, ms after the page is asked for": browser.js("shardcView.painted"),
        }
        layers = "shardcView.app.graph.tree.groups.get('forward/layers').items[0]"
        browser.js(TOGGLE.format(item=layers, want="false"))
        out["opening the repeated layer, ms"] = browser.js(TOGGLE.format(item=layers, want="true"))
        opened = [browser.js(TOGGLE.format(item=f"graph.tree.groups.get('{g}')", want="true")) for g in GROUPS]
        out["opening a module of it for the first time, ms (slowest of four)"] = max(opened)
        out["a frame while panning, ms"] = browser.js(PAN)
        return out


if __name__ == "__main__":
    main()
