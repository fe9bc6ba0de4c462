"""The most bytes that live at once during a step, per rank, beside what DDP and FSDP2 hold.

    python benchmarks/memory.py [--sizes small large] [--json PATH]

Live bytes are counted, not sampled: every storage that an operator returns, from when it is made until it is freed,
on top of the parameters and their gradients' memory as it comes. Forward, loss and backward, gradients cleared
before. Buffers that backends keep outside of torch's operators are not seen, on either side. Beside it what the
compiled program says of itself, which leaves out the loss outside of it.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, SHAPES, batch_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ways import given, make

from shardc import launch

WAYS = ("tp shardc", "tp dtensor", "dp shardc", "dp ddp", "fsdp shardc", "fsdp fsdp2")


class Live(TorchDispatchMode):
    """now, peak: bytes of the storages made while this was on that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._seen(getattr(tensor, "_local_tensor", tensor))
        return result

    def _seen(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.is_meta or not storage.nbytes():
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def measure(rank: int, names: tuple[str, ...], size: str) -> dict[str, int]:
    world, shape = dist.get_world_size(), SHAPES[size]
    torch.manual_seed(0)
    model, batch = GPT(shape), batch_of(shape)
    found = {}
    for name in names:
        mesh, mine = given(name, batch, rank, world)
        step = make(name, model, mesh, rank, world)
        step(*mine)
        step(*mine)
        with Live() as live:
            step(*mine)
        found[name] = live.peak
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for size in options.sizes:
        found = launch(measure, 2, (WAYS, size), timeout=300)
        result[size] = {name: max(one[name] for one in found) for name in WAYS}
        print(f"\n{size}: most live bytes of a step beyond parameters, of the rank that has most")
        for name, peak in result[size].items():
            print(f"{name:14s} {peak / 2**20:8.2f} MiB")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
