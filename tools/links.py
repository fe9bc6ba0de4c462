"""The machine that an estimate is for: how fast a device computes, and which link carries which mesh dim."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


LEFT_OUT = (
    "kernels reach their peak rates (real ones reach half, and less for small sizes)",
    "collectives are rings at the full bandwidth of their link: no contention, no topology, no protocol overhead",
    "every operator that is no view is a kernel of its own: nothing is fused, and a reshape counts as a copy",
    "computation and communication do not slow each other down",
    "every rank is as fast as rank 0, which holds the largest pieces",
    "no time for Python, launches on an idle device, the allocator, loading data, or an optimizer outside the program",
)


def as_json(machine: Hardware, mesh: Mesh) -> dict[str, Any]:
    """What an estimate rests on."""
    carried = {dim: machine.link(mesh, dim) for dim in mesh}
    return {
        "device": machine.name,
        "source": machine.source,
        "flops": machine.flops,
        "memory": machine.memory,
        "links": {dim: {"link": name, "bytes_per_second": rate} for dim, (name, rate) in carried.items()},
        "latency": machine.latency,
        "launch": machine.launch,
        "left_out": list(LEFT_OUT),
    }


def parse_links(text: str, mesh: Mesh) -> Hardware:
    """`h100`, `nvlink=450GB/s,ib=50GB/s`, `h200,ib=25GB/s`, or by mesh dim: `dp=50GB/s,tp=450GB/s`.

    Raises ValueError for other text."""
    machine, given = Hardware.preset("h100"), {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, rate = part.partition("=")
        if equals:
            given[name] = parse_rate(rate)
        else:
            machine = Hardware.preset(name)
    known: Mapping[str, float] = machine.links  # pyright: ignore[reportAssignmentType]
    named = {name for name in given if name not in mesh}
    return replace(machine, links={**(known if named <= set(known) else {}), **given})


def parse_rate(text: str) -> float:
    """`450GB/s` or `400Gb/s` in bytes per second. Raises ValueError for other text."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(B|b)(?:/s|ps)", text.strip())
    value = float(match[1]) * UNITS[match[2]] / (8 if match[3] == "b" else 1) if match else math.nan
    if not value > 0:
        raise ValueError(f"--links: {text!r} is no rate; write 450GB/s or 400Gb/s")
    return value
