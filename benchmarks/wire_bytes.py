"""Bytes that one step puts on the wire, counted at the process group, beside the least that its parallelism needs.

    python benchmarks/wire_bytes.py [--json PATH]

The least is a formula over the model's shape, and knows nothing of the compiler: tensor parallelism all-reduces one
activation four times per block; data parallelism all-reduces every parameter's gradient; fully sharded, every
parameter is gathered once for forward, those that backward reads once more, and every gradient is reduced and
scattered. What torch's own wrappers move is counted beside it. Two gloo ranks; bytes per rank and step.
"""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counting import NAME, Counting, register
from models.gpt import GPT, SHAPES, Shape, batch_of
from torch import nn
from ways import given, make

from shardc import launch

WAYS = ("tp shardc", "tp dtensor", "dp shardc", "dp ddp", "fsdp shardc", "fsdp fsdp2")
FLOAT = 4


def least(kind: str, shape: Shape, n: int) -> int:
    """Bytes per rank and step, in float32, for `GPT` over n ranks."""
    with torch.device("meta"):
        model = GPT(shape)
    every = sum(p.numel() for p in model.parameters())
    share = FLOAT * (n - 1)
    if kind == "tp":
        return 4 * shape.layers * 2 * share * shape.batch * shape.length * shape.width // n
    if kind == "dp":
        return 2 * share * every // n
    return share * (every + _read_by_backward(model) + every) // n


def _read_by_backward(model: GPT) -> int:
    """Elements of the blocks' weights by which gradients are multiplied, so without biases. What comes behind the
    blocks in forward comes before them in backward, and is held."""
    weights = [m.weight for m in model.blocks.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    return sum(w.numel() for w in weights)


def count(rank: int, names: tuple[str, ...], size: str) -> dict[str, Any]:
    register()
    store = dist.PrefixStore("counted", _store())
    dist.destroy_process_group()
    dist.init_process_group(NAME, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    shape = SHAPES[size]
    model, batch = GPT(shape), batch_of(shape)
    found = {}
    for name in names:
        mesh, mine = given(name, batch, rank, 2)
        step = make(name, model, mesh, rank, 2)
        step(*mine)
        step(*mine)  # the first may have settled layouts
        Counting.clear()
        step(*mine)
        found[name] = {"bytes": dict(Counting.bytes), "calls": dict(Counting.calls)}
    return found


def _store() -> Any:
    group = dist.group.WORLD
    assert group is not None
    return group.get_group_store()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for size in options.sizes:
        found = launch(count, 2, (WAYS, size), timeout=300)[0]
        print(f"\n{size}\n{'way':14s} {'bytes':>12s} {'least':>12s} {'ratio':>8s}  collectives")
        for name, row in found.items():
            wanted, sent = least(name.split()[0], SHAPES[size], 2), sum(row["bytes"].values())
            row |= {"least": wanted, "ratio": sent / wanted}
            calls = ", ".join(f"{n} {kind}" for kind, n in row["calls"].items())
            print(f"{name:14s} {sent:12,d} {wanted:12,d} {sent / wanted:8.4f}  {calls}")
        result[size] = found
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
