"""When a rank computes and when it communicates: an estimate from a dumped program and a machine's rates.

Two streams, as on an accelerator. An operator takes the longer of its operations at the device's rate and its
bytes at the memory's rate. A collective that is started runs beside what follows and is waited for where the
program says; one that is not started is waited for at once. What computation waits for is exposed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.tools.links import as_json


@dataclass
class Timeline:
    """Events in seconds: (name, stream, begin, end), streams being compute and communication, and (begin, end)
    of every wait in which nothing was computed."""

    events: list[tuple[str, str, float, float]] = field(default_factory=list)
    exposed: list[tuple[str, float, float]] = field(default_factory=list)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return max((end for _, end in self.phases.values()), default=0.0)

    @property
    def communication(self) -> float:
        return sum(end - begin for _, stream, begin, end in self.events if stream == "communication")

    @property
    def waiting(self) -> float:
        """Seconds of exposed communication."""
        return sum(end - begin for _, begin, end in self.exposed)

    def as_json(self, machine: Hardware, mesh: Mesh) -> dict[str, Any]:
        """In nanoseconds, for the page."""
        return {
            "links": as_json(machine, mesh),
            "seconds": self.seconds,
            "communication": self.communication,
            "exposed": self.waiting,
            "phases": {name: [nano(t) for t in times] for name, times in self.phases.items()},
            "events": [[name, stream, nano(begin), nano(end)] for name, stream, begin, end in self.events],
            "waits": [[name, nano(begin), nano(end)] for name, begin, end in self.exposed],
        }


def estimate(data: dict[str, Any], machine: Hardware) -> Timeline:
    """One step of rank 0."""
    clock = _Clock(data, machine)
    for half in data["memory"]["halves"]:
        begin = clock.now
        for name in half["order"]:
            if name in clock.nodes:
                clock.run(clock.nodes[name])
        clock.finish()
        clock.out.phases[half["phase"]] = (begin, clock.now)
    return clock.out


def mesh_of(data: dict[str, Any]) -> Mesh:
    return Mesh(**{dim["name"]: dim["size"] for dim in data["mesh"]})


class _Clock:
    """Both streams while the program is played."""

    def __init__(self, data: dict[str, Any], machine: Hardware) -> None:
        self.machine, self.out = machine, Timeline()
        self.nodes = {n["name"]: n for n in data["nodes"]}
        self.moves = {c["name"]: c for c in data["collectives"]}
        self.mesh = mesh_of(data)
        self.now = self.wire = 0.0
        self.flying: dict[str, float] = {}

    def run(self, node: dict[str, Any]) -> None:
        name = node["name"]
        if name in self.moves:
            begin = max(self.now, self.wire)
            self.wire = begin + self._on_the_wire(self.moves[name])
            self.out.events.append((name, "communication", begin, self.wire))
            if node["op"] == "shardc.start":
                self.flying[name] = self.wire
            else:
                self._wait(name, self.wire)
        elif node["op"] == "shardc.wait":
            for started in node["inputs"]:
                self._wait(started, self.flying.pop(started, self.now))
        elif node["op"] != "input" and not node["view"] and (taken := self._computing(node)):
            self.out.events.append((name, "compute", self.now, self.now + taken))
            self.now += taken

    def finish(self) -> None:
        """The end of a half: all that was started is there."""
        for name, end in self.flying.items():
            self._wait(name, end)
        self.flying.clear()

    def _wait(self, name: str, until: float) -> None:
        if until > self.now:
            self.out.exposed.append((name, self.now, until))
            self.now = until

    def _on_the_wire(self, move: dict[str, Any]) -> float:
        return self.machine.collective(move["kind"], move["bytes_on_wire"], self.mesh, move["mesh_dim"])

    def _computing(self, node: dict[str, Any]) -> float:
        touched = node["bytes"] + sum(self.nodes[i]["bytes"] for i in node["inputs"] if i in self.nodes)
        dtype = node["results"][0]["dtype"] if node["results"] else ""
        return self.machine.call(node["flops"], touched, dtype) if touched else 0.0


def nano(seconds: float) -> int:
    return round(seconds * 1e9)


def chrome_trace(data: dict[str, Any], timeline: Timeline) -> dict[str, Any]:
    """The timeline as Chrome and Perfetto read it: process 0 is rank 0, with a thread for each stream."""
    nodes = {n["name"]: n for n in data["nodes"]}
    moves = {c["name"]: c for c in data["collectives"]}
    threads = {"compute": 1, "communication": 2, "exposed": 3}
    named = [("process_name", 0, "rank 0 (estimated)"), *(("thread_name", t, name) for name, t in threads.items())]
    out: list[dict[str, Any]] = [
        {"ph": "M", "name": what, "pid": 0, "tid": tid, "args": {"name": name}} for what, tid, name in named
    ]
    for name, stream, begin, end in timeline.events:
        node = nodes[name]
        keys = ("type", "path", "where", "phase", "made_by")
        args = {key: node[key] for key in keys} | {
            key: moves[name][key] for key in ("mesh_dim", "bytes_on_wire") if name in moves
        }
        label = moves[name]["kind"] if name in moves else node["op"]
        out.append(_slice(f"{label} %{name}", node["phase"], threads[stream], begin, end, args))
    out += [_slice(f"waits for %{name}", "wait", 3, begin, end, {}) for name, begin, end in timeline.exposed]
    ranks = {"rank": 0, "world_size": mesh_of(data).size}
    return {"traceEvents": out, "displayTimeUnit": "ms", "distributedInfo": ranks}


def _slice(name: str, kind: str, thread: int, begin: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": round(begin * 1e6, 3), "dur": round((end - begin) * 1e6, 3)}
    return {"ph": "X", "name": name, "cat": kind, "pid": 0, "tid": thread, **times, "args": args}
