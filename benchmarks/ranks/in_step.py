"""What it costs that ranks tell each other which call they are in: step time with it over that without, 2 gloo ranks.

.venv/bin/python benchmarks/ranks/in_step.py        medians of 300 steps of each, in turn; noisy where other things run
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc.runtime.wire.line import Line

STEPS, WIDTH, BLOCKS, ROWS = 300, 128, 4, 64
PLANS: dict[str, tuple[str, Any]] = {
    "tensor parallel": ("tp", {"*.0": ColwiseParallel(), "*.2": RowwiseParallel()}),
    "data parallel": ("dp", shardc.Replicated()),
    "fully sharded": ("dp", shardc.FullyShard("*")),
}


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def measured(rank: int) -> dict[str, tuple[float, float]]:
    """Milliseconds a step without and with it."""
    torch.manual_seed(0)
    found, told = {}, Line.open
    for name, (axis, plan) in PLANS.items():
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
        model = shardc.compile(nn.Sequential(*[block() for _ in range(BLOCKS)]), plan, mesh=mesh)
        x, seconds = torch.randn(ROWS, WIDTH), ([], [])
        for step in range(2 * STEPS + 10):
            Line.open = told if step % 2 else lambda *_: None
            begin = time.perf_counter()
            model(x).square().mean().backward()
            seconds[step % 2].append(time.perf_counter() - begin)
            model.zero_grad()
        Line.open = told
        found[name] = tuple(1e3 * statistics.median(s[5:]) for s in seconds)
    return found


def main() -> None:
    table = Table("plan", "without, ms", "with, ms", "ratio")
    for name, (without, with_) in shardc.launch(measured, 2, timeout=600)[0].items():
        table.add_row(name, f"{without:.2f}", f"{with_:.2f}", f"{with_ / without:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
