"""The machine that an estimate is for: how fast a device computes, and which link carries which mesh dim."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
NODE = 8  # devices that share the first link


@dataclass(frozen=True)
class Device:
    """One accelerator, by its maker's data sheet: dense rates without sparsity, links in one direction."""

    name: str
    flops: dict[str, float]  # operations per second by dtype; "" for the others
    memory: float  # bytes per second
    links: dict[str, float]  # bytes per second, fastest first
    source: str


DEVICES = {
    d.name: d
    for d in (
        Device(
            "a100",
            {"f16": 312e12, "bf16": 312e12, "f64": 19.5e12, "": 19.5e12},
            2.039e12,
            {"nvlink": 300e9, "ib": 25e9},
            "NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s in both directions); HDR InfiniBand, 200 Gb/s",
        ),
        Device(
            "h100",
            {"f16": 989e12, "bf16": 989e12, "f64": 67e12, "": 67e12},
            3.35e12,
            {"nvlink": 450e9, "ib": 50e9},
            "NVIDIA H100 SXM data sheet (NVLink 900 GB/s in both directions); NDR InfiniBand, 400 Gb/s",
        ),
        Device(
            "h200",
            {"f16": 989e12, "bf16": 989e12, "f64": 67e12, "": 67e12},
            4.8e12,
            {"nvlink": 450e9, "ib": 50e9},
            "NVIDIA H200 SXM data sheet (NVLink 900 GB/s in both directions); NDR InfiniBand, 400 Gb/s",
        ),
    )
}

LEFT_OUT = (
    "kernels reach their peak rates (real ones reach half, and less for small sizes)",
    "collectives are rings at the full bandwidth of their link: no contention, no topology, no protocol overhead",
    "every operator that is no view is a kernel of its own: nothing is fused, and a reshape counts as a copy",
    "computation and communication do not slow each other down",
    "every rank is as fast as rank 0, which holds the largest pieces",
    "no time for Python, launches on an idle device, the allocator, loading data, or an optimizer outside the program",
)


@dataclass(frozen=True)
class Links:
    """A device, and for each mesh dim the link that carries it: (name, bytes per second).

    latency: seconds per step of a ring. launch: seconds that any operator takes at least.
    """

    device: Device
    dims: dict[str, tuple[str, float]]
    latency: float = 5e-6
    launch: float = 3e-6

    def as_json(self) -> dict[str, Any]:
        """What an estimate rests on."""
        return {
            "device": self.device.name,
            "source": self.device.source,
            "flops": self.device.flops,
            "memory": self.device.memory,
            "links": {dim: {"link": name, "bytes_per_second": rate} for dim, (name, rate) in self.dims.items()},
            "latency": self.latency,
            "launch": self.launch,
            "left_out": list(LEFT_OUT),
        }


def parse_links(text: str, mesh: Sequence[tuple[str, int]]) -> Links:
    """`h100`, `nvlink=450GB/s,ib=50GB/s`, `h200,ib=25GB/s`, or by mesh dim: `dp=50GB/s,tp=450GB/s`.

    mesh: names and sizes, outermost first. Mesh dims get the first link from the innermost outwards for as long
    as they stay within 8 devices, and the last link beyond. Raises ValueError for other text."""
    device, given = DEVICES["h100"], {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, rate = part.partition("=")
        if not equals:
            if name not in DEVICES:
                raise ValueError(
                    f"--links: no preset {name!r}; there are {', '.join(DEVICES)}, or write nvlink=450GB/s"
                )
            device = DEVICES[name]
        else:
            given[name] = parse_rate(rate)
    by_dim = {name: given.pop(name) for name, _ in mesh if name in given}
    links = list({**(device.links if not given or set(given) <= set(device.links) else {}), **given}.items())
    dims, inside = {}, 1
    for name, size in reversed(mesh):
        inside *= size
        dims[name] = links[0] if inside <= NODE else links[-1]
    dims |= {name: (name, rate) for name, rate in by_dim.items()}
    return Links(device, {name: dims[name] for name, _ in mesh})


def parse_rate(text: str) -> float:
    """`450GB/s` or `400Gb/s` in bytes per second. Raises ValueError for other text."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(B|b)(?:/s|ps)", text.strip())
    value = float(match[1]) * UNITS[match[2]] / (8 if match[3] == "b" else 1) if match else math.nan
    if not value > 0:
        raise ValueError(f"--links: {text!r} is no rate; write 450GB/s or 400Gb/s")
    return value
