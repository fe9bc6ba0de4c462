"""A thousand steps: resident memory and the number of Python objects stay where they are.

    python benchmarks/soak.py [--steps 1000] [--size small]

Two gloo ranks; every way of shardc's in turn. Exits with an error where, between the first fifth and the end, the
resident size grows by more than 8 MiB or the objects by more than a hundred.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from models.gpt import GPT, SHAPES, batch_of
from ways import given, make

from shardc import launch

WAYS = ("tp shardc", "tp shardc train_step", "dp shardc", "fsdp shardc")
MIB, OBJECTS = 8, 100


def measure(rank: int, names: tuple[str, ...], size: str, steps: int) -> dict[str, Any]:
    """By way: (resident KiB, Python objects) after a fifth of the steps and after each fifth to come."""
    world, shape = dist.get_world_size(), SHAPES[size]
    torch.manual_seed(0)
    model, batch = GPT(shape), batch_of(shape)
    found = {}
    for name in names:
        mesh, mine = given(name, batch, rank, world)
        step = make(name, model, mesh, rank, world)
        seen = []
        for i in range(1, steps + 1):
            step(*mine)
            if i % (steps // 5) == 0:
                gc.collect()
                seen.append((_resident(), len(gc.get_objects())))
        found[name] = seen
        del step
        gc.collect()
    return found


def _resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", default="small", choices=SHAPES)
    options = parser.parse_args()
    grown = []
    for rank, found in enumerate(launch(measure, 2, (WAYS, options.size, options.steps), timeout=580)):
        for name, seen in found.items():
            print(f"rank {rank} {name:22s} KiB {[r for r, _ in seen]} objects {[n for _, n in seen]}")
            (first, objects), (last, more) = seen[0], seen[-1]
            if last - first > MIB * 1024 or more - objects > OBJECTS:
                grown.append(f"rank {rank} {name}")
    if grown:
        sys.exit(f"grows: {', '.join(grown)}")


if __name__ == "__main__":
    main()
