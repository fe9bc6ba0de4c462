"""A measured torch.profiler trace put onto a program's values, by operator name and order.

A rank runs its program operator by operator, so the trace holds them in the program's order, with other events
between. They are matched backwards from the end of the trace, which is the last step that was measured.
"""

from __future__ import annotations

import json
import os
from typing import Any

NEAR = 400  # events between two operators of a half
ENOUGH = 0.8  # of the operators must be found, else the trace is of something else
CARRIERS = ("alltoall", "allgather")  # by which ranks also carry out other collectives
RUN_AS_OTHERS = ("input", "getitem", "shardc.wait", "shardc.make_partial", "shardc.local_slice")


def load_trace(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `profiler.export_chrome_trace(path)` wrote. Raises ValueError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            trace = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a trace ({error})") from None
    if not isinstance(trace, dict) or "traceEvents" not in trace:
        raise ValueError(f"{path} is not a trace: write it with profiler.export_chrome_trace")
    return trace


def join(data: dict[str, Any], trace: dict[str, Any]) -> dict[str, Any]:
    """{"events": [[name, stream, begin, end], ...], "matched", "expected"}: times in nanoseconds from the first.

    Raises ValueError where most of the program's operators are not in the trace."""
    nodes = {n["name"]: n for n in data["nodes"]}
    real = {c["name"] for c in data["collectives"]}  # over one rank nothing is sent
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    wanted, found = [], []
    for half in reversed(data["memory"]["halves"]):
        order = [nodes[name] for name in half["order"] if name in nodes]
        seen = [n for n in order if n["op"] not in RUN_AS_OTHERS and (not n["moves"] or n["name"] in real)]
        hits = _match(seen, events)
        wanted, found = seen + wanted, hits + found
        events = [e for e in events if not hits or e["ts"] < hits[0][1]["ts"]]
    if len(found) < ENOUGH * len(wanted) or not found:
        raise ValueError(
            f"the trace is not of this program: {len(found)} of {len(wanted)} operators are in it, in this order\n"
            "  = help: profile a step of the compiled module on a real rank, and dump the program of the same run"
        )
    first = found[0][1]["ts"]
    rows = [_row(node, event, first) for node, event in found]
    return {"events": rows, "matched": len(found), "expected": len(wanted)}


def _match(wanted: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Operators of one half with their events, the last ones first looked for; behind a half anything may run."""
    found, at = [], len(events) - 1
    for node in reversed(wanted):
        near = range(at, max(-1, at - NEAR) if found else -1, -1)
        hit = next((i for i in near if _is(events[i]["name"], node)), None)
        if hit is not None:
            found.append((node, events[hit]))
            at = hit - 1
    return found[::-1]


def _is(event: str, node: dict[str, Any]) -> bool:
    if node["moves"]:
        event = event.replace("_", "").lower()
        return event.startswith("c10d") and any(kind in event for kind in (node["moves"].replace("_", ""), *CARRIERS))
    family, _, rest = node["op"].partition(".")
    return event == f"{family}::{rest.split('.')[0]}"


def _row(node: dict[str, Any], event: dict[str, Any], first: float) -> list[Any]:
    begin = round((event["ts"] - first) * 1000)
    return [node["name"], "communication" if node["moves"] else "compute", begin, begin + round(event["dur"] * 1000)]
