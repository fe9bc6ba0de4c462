"""Memory: how a limit is written, and what parameters, their gradients and the optimizer's state take of a rank.

The optimizer is taken for Adam: two moments of each trained parameter, in its dtype, stored as it is. What a step
takes beside, activations and what collectives take, is counted of the finished program (`analysis/memory.py`).
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.layout import bad_option
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh

MOMENTS = 2
UNITS = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}


def limit(memory: Any, capacity: float) -> float:
    """Bytes of a rank: given as a number or as text such as "80GB" or "64GiB", else what the device has.

    Raises PlanError for what is no number of bytes above 0.
    """
    if memory is None:
        return capacity
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", memory.lower()) if isinstance(memory, str) else None
    if found is not None:
        number, unit, binary = found.groups()
        memory = float(number) * ((1024 if binary else 1000) ** UNITS[unit] if unit else 1)
    if not isinstance(memory, (int, float)) or isinstance(memory, bool) or not memory > 0:
        raise bad_option("memory", memory, 'bytes of a rank above 0, or text such as "80GB"')
    return float(memory)


def moments(plan: Resolved) -> int:
    """Bytes of the optimizer's state on the rank that holds most."""
    return sum(MOMENTS * _held(plan, name) for name, layout in plan.params.items() if layout.requires_grad)


def held_bytes(plan: Resolved) -> int:
    """Bytes of parameters and the optimizer's state: what a rank has at any time."""
    return sum(_held(plan, name) for name in plan.params) + moments(plan)


def state_bytes(plan: Resolved) -> int:
    """Bytes of parameters, gradients and the optimizer's state at the end of a step: no program takes less."""
    trained = [name for name, layout in plan.params.items() if layout.requires_grad]
    return held_bytes(plan) + sum(_held(plan, name) for name in trained)


def check_floor(model: nn.Module, mesh: Mesh, most: float) -> None:
    """Raises PlanError where not even the state, split over all ranks, is below the limit."""
    found = sum(p.numel() * p.element_size() * (2 + MOMENTS if p.requires_grad else 1) for p in model.parameters())
    least = math.ceil(found / mesh.size)
    if least > most:
        raise PlanError(
            f"memory is {readable(most)} a rank, and parameters, gradients and the optimizer's state alone take "
            f"{readable(least)} on each of {mesh.size} ranks",
            help="more ranks, or more memory",
        )


def readable(nbytes: float) -> str:
    """Three digits and a unit."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB" if nbytes < 999.5 else f"{nbytes:,.0f} GB"


def _held(plan: Resolved, name: str) -> int:
    layout = plan.params[name]
    return math.prod(layout.stored.local_shape(plan.mesh, plan.mesh.coords(0))) * layout.dtype.itemsize
