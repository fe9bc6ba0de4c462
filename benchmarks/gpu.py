"""Tokens per second on one CUDA GPU: one rank's program with its collectives on a group of one, beside plain torch.

    python benchmarks/gpu.py [--width 1024] [--layers 8] [--rounds 20] [--json PATH]

Ways: the model as it is, torch.compile of it, and shardc (eager and inductor) fully sharded over one rank, which
runs every step of the sharded program but sends nothing. Forward, loss and backward, bfloat16 weights. They take
turns within each round; the median is shown. Without a GPU nothing runs, which is said.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models.gpt import GPT, Shape, batch_of
from torch.distributed.device_mesh import init_device_mesh
from ways import FSDP, step_of

import shardc


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Median seconds per step by way."""
    torch.manual_seed(0)
    model = GPT(shape).to("cuda", torch.bfloat16)
    x, y = (t.cuda() for t in batch_of(shape))
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("dp",))
    steps = {
        "torch": step_of(copy.deepcopy(model)),
        "torch.compile": step_of(torch.compile(copy.deepcopy(model))),  # pyright: ignore[reportArgumentType]
        "shardc": step_of(shardc.compile(copy.deepcopy(model), FSDP, mesh=mesh)),
        "shardc inductor": step_of(shardc.compile(copy.deepcopy(model), FSDP, mesh=mesh, backend="inductor")),
    }
    for step in steps.values():
        for _ in range(3):
            step(x, y)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name](x, y)
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: skipped, as this machine has no CUDA GPU")
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    heads = max(options.width // 64, 1)
    shape = Shape(options.width, heads, options.layers, 32000, options.length, options.batch)
    found: dict[str, Any] = measure(shape, options.rounds)
    tokens = shape.batch * shape.length
    for name, seconds in found.items():
        print(f"{name:16s} {1000 * seconds:8.2f} ms  {tokens / seconds:10,.0f} tokens/s")
    dist.destroy_process_group()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
