"""Reads a program that was dumped as JSON: the schema is checked, stages and explanations are put together again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

SCHEMA = "shardc.program/1"
STAGES = ("TRACED", "SHARDED", "RESHARDED", "LOCAL", "SCHEDULED")
DEPTH = 40  # as deep as the compiler's own explanations go


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A program from a file that `program.dump` wrote. Raises ValueError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})\n  = help: write it with program.dump({path!r})") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        what = f"has schema {found}" if found else "is not a program"
        raise ValueError(f"{path} {what}, and this shardc reads {SCHEMA}\n  = help: dump it again with this shardc")
    return data


def stage_text(data: dict[str, Any], name: str) -> str:
    """The program's text at the end of a stage, as `program.stage(name)` gives it."""
    values = {line[0]: line[1:] for line in data["traced"]}
    for step in data["passes"]:
        if STAGES.index(step["stage"]) <= STAGES.index(name) != 0:
            values = after(values, step)
    mesh = " ".join(f"{dim['name']}={dim['size']}" for dim in data["mesh"])
    lines = [f"return {made}" if n == "return" else f"%{n}: {kind} = {made}" for n, (kind, made) in values.items()]
    return "\n".join([f"mesh {mesh}", *lines])


def after(values: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """The values of a program, name -> (type, made by) in order, after one pass."""
    changed = {name: line for name, *line in step["changed"]}
    gone = set(step["removed"])
    kept = {name: changed.get(name, line) for name, line in values.items() if name not in gone}
    follows: dict[str, list[Any]] = {}
    for name, kind, made, last in step["added"]:
        follows.setdefault(last, []).append((name, (kind, made)))
    out: dict[str, Any] = {}
    stack: list[Any] = [("", None), *kept.items()][::-1]
    while stack:
        name, line = stack.pop()
        out[name] = line
        stack += follows.pop(name, [])[::-1]
    del out[""]
    return {name: out[name] for name in step.get("order", out)}


def explain(data: dict[str, Any], value: str) -> str:
    """Why a value has its layout, as `program.explain(value)` says it, less the value's own line.

    Raises ValueError for a name that is not in the program."""
    reasons, name = data["reasons"], value.removeprefix("%")
    if name not in reasons:
        raise ValueError(f"no value %{name} in the program")
    axes = list(reasons[name]["from"])
    if not axes:
        return "  whole on every rank: no mesh dim splits it"
    named = {entry["node"]: entry["is"] for entry in data["inputs"]}
    return "\n".join(line for axis in axes for line in (f"  {axis}:", *_chain(reasons, name, axis, named)))


def _chain(reasons: dict[str, Any], name: str, axis: str, named: dict[str, str]) -> Iterator[str]:
    for _ in range(DEPTH):
        at = reasons[name]
        source, rule, why = at["from"].get(axis), at["rule"], at["why"]
        how = f" (rule {rule})" if rule else ""
        if at["op"] == "input":
            yield f"    %{name} is {named.get(name, 'an input')}, laid out so by {why or 'its default'}"
        elif why:
            yield f"    %{name} was laid out so by {why}"
        elif source is None:
            yield f"    %{name} = {at['op']}{how}: the split begins here"
        else:
            yield f"    %{name} = {at['op']}{how}, from %{source}: {reasons[source]['layout']}"
        if source is None:
            return
        name = source
    yield "    ..."
