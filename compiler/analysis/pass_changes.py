"""What each pass changed in the program's text, value by value: enough to replay every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardc.compiler.pipeline.runner import Record

Line = tuple[str, str]  # type, and what it is made by: ("f32[8@dp, 16]", "aten.mm(%x, %w)")


def parse(text: str) -> dict[str, Line]:
    """The values of a program's text in order; what it returns is the value `return`."""
    out: dict[str, Line] = {}
    name = ""
    for line in text.split("\n"):
        if line.startswith("%") and ": " in line:
            name, _, rest = line[1:].partition(": ")
            kind, _, body = rest.partition(" = ")
            out[name] = (kind, body)
        elif line.startswith("return "):
            name = "return"
            out[name] = ("", line.removeprefix("return "))
        elif name in out:  # a module's name may hold a line break
            kind, body = out[name]
            out[name] = (kind, f"{body}\n{line}")
    return out


def lines(text: str) -> list[list[str]]:
    """[name, type, made by] of every value."""
    return [[name, *line] for name, line in parse(text).items()]


def changes(record: Record) -> dict[str, Any]:
    """One pass: `removed` names, `changed` [name, type, made by], `added` [name, type, made by, the value it comes
    after or ""], and the whole `order` where values that stayed have changed places."""
    before, after = parse(record.before), parse(record.after)
    removed = [name for name in before if name not in after]
    changed = [[name, *line] for name, line in after.items() if name in before and before[name] != line]
    names = ["", *after]
    added = [[name, *after[name], last] for last, name in zip(names, names[1:], strict=False) if name not in before]
    replayed = insert([name for name in before if name in after], added)
    return {
        "name": record.name,
        "stage": record.stage.name,
        "seconds": record.seconds,
        "counts": record.changes,
        "notes": list(record.notes),
        "removed": removed,
        "changed": changed,
        "added": added,
        **({"order": list(after)} if replayed != list(after) else {}),
    }


def insert(order: list[str], added: Sequence[Sequence[str]]) -> list[str]:
    """Names with each added one behind the value that it comes after."""
    follows: dict[str, list[str]] = {}
    for name, *_, last in added:
        follows.setdefault(last, []).append(name)
    out: list[str] = []
    stack = ["", *order][::-1]
    while stack:
        name = stack.pop()
        out.append(name)
        stack += follows.pop(name, [])[::-1]
    return out[1:]
