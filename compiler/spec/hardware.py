"""The machine that costs are counted for: how fast a device computes, and how fast each mesh dim carries bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

from shardc.compiler.errors import PlanError
from shardc.compiler.spec.cost import seconds
from shardc.compiler.spec.mesh import Mesh

NODE = 8  # devices that share the first link
Rates = Mapping[str, float]


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links; `Hardware.preset("h100")` is one by its maker's data sheet.

    flops: operations a second by dtype as programs print it, "" for the others, dense, a multiply and an add as two.
    memory: bytes a second. capacity: bytes. links: bytes a second in one direction by name, fastest first: mesh dims
    get the first from the innermost outwards for as long as they stay within 8 devices, and the last beyond; a link
    named as a mesh dim carries that one. latency: seconds for each step of a ring, of all mesh dims or by mesh dim.
    launch: seconds that any operator takes at least. source: where the figures are from.
    """

    name: str
    flops: Rates | float
    memory: float
    links: Rates | float
    capacity: float = math.inf
    latency: Rates | float = 5e-6
    launch: float = 3e-6
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for what in ("flops", "links"):
            if not isinstance(given := getattr(self, what), Mapping):
                object.__setattr__(self, what, {"": given})
            self._check(what, lambda rate: rate > 0, "rates are positive numbers")
            if not getattr(self, what):
                raise PlanError(f"hardware {self.name} has no {what}", help=f"give one rate in {what}=, or several")
        self._check("memory", lambda rate: rate > 0, "rates are positive numbers")
        self._check("capacity", lambda size: size > 0, "its capacity is a number of bytes above 0")
        for what in ("latency", "launch"):
            self._check(what, lambda time: 0 <= time < math.inf, "times are numbers of seconds, 0 or more")

    def _check(self, what: str, fits: Callable[[float], bool], text: str) -> None:
        given = getattr(self, what)
        for value in given.values() if isinstance(given, Mapping) else (given,):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not fits(value):
                raise PlanError(f"hardware {self.name}: {text}", help=f"look at {what}, which has {value!r}")

    def check(self, mesh: Mesh) -> None:
        """Raises PlanError where it lacks a link, or a latency, for a mesh dim."""
        for dim in mesh.names:
            self.link(mesh, dim)
            self._latency(mesh, dim)

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """Raises PlanError for a name that there is no preset of."""
        if name not in PRESETS:
            raise PlanError(f"there is no hardware {name!r}", help=f"presets: {', '.join(PRESETS)}; or a Hardware")
        return PRESETS[name]

    @classmethod
    def of(cls, given: Self | str | None) -> Hardware:
        """What `hardware=` means: None is neutral."""
        if given is None or isinstance(given, str):
            return NEUTRAL if given is None else cls.preset(given)
        if not isinstance(given, Hardware):
            raise PlanError(f"hardware={given!r} is no machine", help="pass a shardc.Hardware, or a preset's name")
        return given

    def link(self, mesh: Mesh, dim: str) -> tuple[str, float]:
        """The link that carries a mesh dim, or a part of one: name, and bytes a second."""
        given: Rates = self.links  # pyright: ignore[reportAssignmentType]
        links, whole = {**given}, mesh.dim_of(dim)
        if whole in links:
            return whole, links[whole]
        between = [(name, rate) for name, rate in links.items() if name not in mesh]
        if not between:
            raise PlanError(f"hardware {self.name} has no link for mesh dim {whole}", help="name it in links=")
        inner = math.prod(
            n for name, n in zip(mesh.names, mesh.shape, strict=True) if name not in self._outside(mesh, whole)
        )
        return between[0] if inner <= NODE else between[-1]

    def _outside(self, mesh: Mesh, dim: str) -> tuple[str, ...]:
        return mesh.names[: mesh.names.index(dim)]

    def collective(self, kind: str, sent: float, mesh: Mesh, dim: str) -> float:
        """Seconds that a collective takes. sent: bytes that a rank sends."""
        return seconds(kind, sent, mesh[dim], self._latency(mesh, dim), self.link(mesh, dim)[1])

    def _latency(self, mesh: Mesh, dim: str) -> float:
        if not isinstance(self.latency, Mapping):
            return self.latency
        whole = mesh.dim_of(dim)
        if whole not in self.latency:
            raise PlanError(f"hardware {self.name} has no latency for mesh dim {whole}", help="name it in latency=")
        return self.latency[whole]

    def call(self, flops: float, touched: float, dtype: str = "") -> float:
        """Seconds that an operator takes: the longer of its operations and its bytes, both at the peak rate."""
        rates: Rates = self.flops  # pyright: ignore[reportAssignmentType]
        rate = rates.get(dtype) or rates.get("") or min(rates.values())
        return max(flops / rate, touched / self.memory, self.launch)


# So that a program does not depend on the machine that compiles it. A byte on the wire takes a nanosecond, one that is
# touched 1/64 of it, and an operation four: a real device computes hundreds of times faster, but what ranks repeat is
# what does not shrink with their number, however small the model that it is tried on. Of two ways that move as much,
# the one in fewer steps is shorter: a step of a ring costs 350 bytes.
NEUTRAL = Hardware("neutral", 0.25e9, 64e9, 1e9, latency=0.35e-6, launch=0.0, source="a convention, no machine")

PRESETS = {
    machine.name: machine
    for machine in (
        NEUTRAL,
        Hardware(
            "a100",
            {"f16": 312e12, "bf16": 312e12, "f64": 19.5e12, "": 19.5e12},
            2.039e12,
            {"nvlink": 300e9, "ib": 25e9},
            capacity=80e9,
            source="NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s in both directions); HDR InfiniBand, 200 Gb/s",
        ),
        Hardware(
            "h100",
            {"f16": 989e12, "bf16": 989e12, "f64": 67e12, "": 67e12},
            3.35e12,
            {"nvlink": 450e9, "ib": 50e9},
            capacity=80e9,
            source="NVIDIA H100 SXM data sheet (NVLink 900 GB/s in both directions); NDR InfiniBand, 400 Gb/s",
        ),
        Hardware(
            "h200",
            {"f16": 989e12, "bf16": 989e12, "f64": 67e12, "": 67e12},
            4.8e12,
            {"nvlink": 450e9, "ib": 50e9},
            capacity=141e9,
            source="NVIDIA H200 SXM data sheet (NVLink 900 GB/s in both directions); NDR InfiniBand, 400 Gb/s",
        ),
    )
}
