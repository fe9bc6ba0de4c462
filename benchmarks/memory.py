"""The most bytes that live at once during a step, per rank, beside what DDP and FSDP2 hold.

    python benchmarks/memory.py [--sizes small large] [--json PATH]

Live bytes are counted, not sampled: every storage that an operator takes or returns, from when it is made until it is
freed or emptied, on top of what there was before: parameters and the batch. Forward, loss and backward, gradients
cleared before. Buffers that backends keep outside of torch's operators are not seen, on either side. Beside it what the
compiled program says of itself, which leaves out the loss outside of it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models.gpt import GPT, SHAPES, batch_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ways import given, make

from shardc import launch

WAYS = ("tp shardc", "tp dtensor", "dp shardc", "dp ddp", "fsdp shardc", "fsdp fsdp2")


class Live(TorchDispatchMode):
    """peak: the most bytes of all storages that operators took or made, and that are still there, but for those given
    as `beside`. Sizes are asked for anew each time, as FSDP2 empties storages that it keeps and fills again."""

    def __init__(self, known: Any = (), beside: Mapping[int, StorageWeakRef] | None = None) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, StorageWeakRef] = {}
        self._beside = beside or {}
        self._see(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see((args, kwargs, out))
        return out

    def _see(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                if storage._cdata not in self._held and storage._cdata not in self._beside:
                    self._held[storage._cdata] = StorageWeakRef(storage)
        self._held = {key: ref for key, ref in self._held.items() if not ref.expired()}
        sizes = (torch.UntypedStorage._new_with_weak_ptr(key) for key in self._held)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in sizes if storage is not None))


def full_storages() -> dict[int, StorageWeakRef]:
    """Those of all tensors that Python knows, if they hold anything. While a reference is there, no other storage
    takes the number of one that is gone."""
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not x.is_meta]
    storages = [getattr(x, "_local_tensor", x).untyped_storage() for x in found]
    return {storage._cdata: StorageWeakRef(storage) for storage in storages if storage.nbytes()}


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
        with Live(beside=full_storages()) as live:
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
