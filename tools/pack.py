"""A dumped program made small: columns of numbers that repeat from layer to layer, and each string once.

tools/viewer/src/unpack.js undoes it. References between values are written as distances, so that equal layers
become equal numbers, which gzip folds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

REFERENCE = re.compile(r"%(\w+)")
MARK = "\x01"  # stands in a text for the next reference
TEXTS = ("op", "moves", "type", "path", "phase", "where", "file", "made_by", "recompute")
NUMBERS = ("line", "bytes", "flops")


class Table:
    """Things that are written once; `of` gives a thing's number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, thing: str) -> int:
        return self._numbers.setdefault(thing, len(self._numbers))

    def all(self) -> list[str]:
        return list(self._numbers)

    def __contains__(self, thing: str) -> bool:
        return thing in self._numbers


class Packer:
    """One program's tables while it is packed."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.names, self.strings = Table(), Table()
        rows: Iterable[Sequence[str]] = (*data["traced"], *(row for p in data["passes"] for row in p["added"]))
        for row in rows:
            self.names.of(row[0])
        for node in data["nodes"]:
            self.names.of(node["name"])
        for name in data["reasons"]:
            self.names.of(name)

    def texts(self, values: Iterable[str]) -> list[int]:
        return [self.strings.of(v) for v in values]

    def refs(self, values: Iterable[str]) -> list[int]:
        """Names as distances from one to the next."""
        return distances([self.names.of(v) for v in values])

    def text_with_refs(self, name: str, text: str) -> tuple[int, list[int]]:
        """A text's number with its references to known values taken out, and those as distances from `name`."""
        own, refs = self.names.of(name), []

        def take(match: re.Match[str]) -> str:
            if match[1] not in self.names:
                return match[0]
            refs.append(own - self.names.of(match[1]))
            return MARK

        return self.strings.of(REFERENCE.sub(take, text.replace(MARK, "?"))), refs

    def lines(self, rows: Iterable[Sequence[str]]) -> dict[str, Any]:
        """[name, type, made by, and perhaps what it comes after] as columns."""
        names, kinds, bodies, refs, after = [], [], [], [], []
        for name, kind, body, *last in rows:
            number, found = self.text_with_refs(name, body)
            names.append(self.names.of(name))
            kinds.append(self.strings.of(kind))
            bodies.append(number)
            refs += [len(found), *found]
            after += [self.names.of(name) - self.names.of(x) if x else 0 for x in last]
        return {"name": distances(names), "type": kinds, "body": bodies, "refs": refs, "after": after}


def pack(data: dict[str, Any]) -> dict[str, Any]:
    """The same program, small. `memory.halves[].alive` is left out: it is the sum of what lives."""
    packer = Packer(data)
    nodes = _nodes(packer, data["nodes"])
    reasons = _reasons(packer, data["reasons"])
    traced = packer.lines(data["traced"])
    passes = [_step(packer, step) for step in data["passes"]]
    memory = {**data["memory"], "halves": [_half(packer, half) for half in data["memory"]["halves"]]}
    number, refs = packer.text_with_refs(data["nodes"][0]["name"] if data["nodes"] else "", data["returned"])
    rest = {"nodes": nodes, "reasons": reasons, "traced": traced, "passes": passes, "memory": memory}
    tables = {"names": packer.names.all(), "strings": packer.strings.all()}
    return {**data, **rest, "returned": [number, refs], **tables, "packed": 1}


def _nodes(packer: Packer, nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": packer.refs(n["name"] for n in nodes)}
    for key in TEXTS:
        out[key] = packer.texts(n[key] for n in nodes)
    for key in NUMBERS:
        out[key] = [n[key] for n in nodes]
    out["origin"] = [packer.names.of(n["name"]) - packer.names.of(n["origin"]) if n["origin"] else 0 for n in nodes]
    out["view"] = [int(n["view"]) for n in nodes]
    out["results"] = packer.texts(json.dumps(n["results"]) for n in nodes)
    args = [packer.text_with_refs(n["name"], n["args"]) for n in nodes]
    out["args"] = [number for number, _ in args]
    out["args_refs"] = [x for _, refs in args for x in (len(refs), *refs)]
    out["inputs"] = [
        x
        for n in nodes
        for x in (len(n["inputs"]), *(packer.names.of(n["name"]) - packer.names.of(i) for i in n["inputs"]))
    ]
    return out


def _reasons(packer: Packer, reasons: dict[str, dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": packer.refs(reasons)}
    for key in ("op", "layout", "rule", "why"):
        out[key] = packer.texts(r[key] for r in reasons.values())
    out["axes"] = packer.texts(json.dumps(list(r["from"])) for r in reasons.values())
    out["from"] = [
        0 if source is None else packer.names.of(name) - packer.names.of(source)
        for name, r in reasons.items()
        for source in r["from"].values()
    ]
    return out


def _step(packer: Packer, step: dict[str, Any]) -> dict[str, Any]:
    order = {"order": packer.refs(step["order"])} if "order" in step else {}
    rows = {"changed": packer.lines(step["changed"]), "added": packer.lines(step["added"])}
    return {**step, "removed": packer.refs(step["removed"]), **rows, **order}


def _half(packer: Packer, half: dict[str, Any]) -> dict[str, Any]:
    values = half["values"]
    return {
        "phase": half["phase"],
        "start": half["start"],
        "order": packer.refs(half["order"]),
        "name": packer.refs(v[0] for v in values),
        "bytes": [v[1] for v in values],
        "begin": distances([v[2] for v in values]),
        "lasts": [v[3] - v[2] for v in values],
    }


def distances(values: Sequence[int]) -> list[int]:
    """Each number less the one before it."""
    return [b - a for a, b in zip([0, *values], values, strict=False)]
