"""The viewer's page: one HTML file with the program inside, that opens offline and asks nobody for anything.

It is made from a dumped program alone (docs/viewer.md), never from a live graph, and nothing of a model is ever
executed: the data is text to the browser, and the page's policy lets only the viewer's own script run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from shardc.tools.links import parse_links
from shardc.tools.pack import distances, pack
from shardc.tools.timeline import estimate, mesh_of

POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'"
)


def page(
    *programs: dict[str, Any], titles: Sequence[str] = (), links: str = "h100", measured: dict[str, Any] | None = None
) -> str:
    """The HTML of one dumped program, or of two to be compared. links: as `parse_links` reads it.
    measured: of the first, as `tools.measured.join` gives it."""
    names = (*titles, *(_title(data) for data in programs[len(titles) :]))
    parts = [
        {"title": title, "program": pack(data), "timeline": _timeline(data, links)}
        for title, data in zip(names, programs, strict=True)
    ]
    if measured is not None:
        number = {n["name"]: i for i, n in enumerate(programs[0]["nodes"])}
        parts[0]["timeline"]["measured"] = {**measured, "events": _columns(measured["events"], number)}
    data = json.dumps(parts, separators=(",", ":")).encode()
    static = files("shardc.tools") / "static"
    script, style, shell = ((static / name).read_text("utf-8") for name in ("viewer.js", "viewer.css", "viewer.html"))
    fields = {
        "POLICY": POLICY.format(script=_digest(script), style=_digest(style)),
        "TITLE": html.escape(names[0] if names else "shardc"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": base64.b64encode(gzip.compress(data, mtime=0)).decode(),
    }
    return "".join(fields.get(piece, piece) if i % 2 else piece for i, piece in enumerate(shell.split("@@")))


def _title(data: dict[str, Any]) -> str:
    mesh = " ".join(f"{dim['name']}={dim['size']}" for dim in data["mesh"])
    return f"{mesh}, {data['hash'][:6]}"


def _timeline(data: dict[str, Any], links: str) -> dict[str, Any]:
    """Events as columns: numbers of nodes, and times as distances."""
    used = parse_links(links, mesh_of(data))
    out = estimate(data, used).as_json(used, mesh_of(data))
    number = {n["name"]: i for i, n in enumerate(data["nodes"])}
    events, waits = out["events"], out["waits"]
    out["events"] = _columns(events, number)
    out["waits"] = [[number[name], begin, end] for name, begin, end in waits]
    return out


def _columns(events: Sequence[Sequence[Any]], number: dict[str, int]) -> dict[str, Any]:
    return {
        "node": distances([number[e[0]] for e in events]),
        "wire": [int(e[1] == "communication") for e in events],
        "begin": distances([e[2] for e in events]),
        "lasts": [e[3] - e[2] for e in events],
    }


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
