"""What each pass changed in the program's text, value by value: enough to replay every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardc.compiler.pipeline.runner import Record


def changes(record: Record) -> dict[str, Any]:
    """One pass: `removed` names, `changed` [name, type, made by], `added` [name, type, made by, the value it comes
    after or ""], and the whole `order` where values that stayed have changed places."""
    before, after = ({line.name: line for line in lines} for lines in (record.found, record.left))
    removed = [name for name in before if name not in after]
    changed = [list(line) for name, line in after.items() if name in before and before[name] != line]
    names = ["", *after]
    added = [[*after[name], last] for last, name in zip(names, names[1:], strict=False) if name not in before]
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
