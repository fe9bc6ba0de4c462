"""What a replica costs per parameter, beside copy.deepcopy and beside the broadcast that DDP starts with.

    python benchmarks/replicas.py [--layers 50 200 800] [--width 64] [--rounds 15] [--json PATH]

Each contender makes one more copy of the same model: `replicas(net, ["cpu", "cpu"])` (its first replica is
the source's memory), `copy.deepcopy(net)`, and DDP's own coalesced broadcast from one process to another over
loopback (its copy exists before, so only the transfer is timed). They take turns within each round; a ratio
is the median over rounds, so a busy machine slows both sides of it, and a time is the best of all rounds.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardc.runtime.replicas.replicas import replicas

TWO = ["cpu", "cpu"]
TIMEOUT = timedelta(seconds=60)
DDP_BUCKET = 250 * 2**20  # bytes, DDP's own for this broadcast


def model(layers: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


class Allocated(TorchDispatchMode):
    """Bytes of every storage that an operator returned while this was on."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


def bytes_beyond_the_replicas(net: nn.Module) -> int:
    with Allocated() as allocated:
        made = replicas(net, TWO)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    new = sum(size for pointer, size in allocated.storages.items() if pointer not in own)
    del made
    return new - sum(p.numel() * p.element_size() for p in net.parameters())


def seconds(run: Callable[[], object], ready: Callable[[], object] = lambda: None) -> float:
    gc.collect()
    gc.disable()  # as timeit does: a collection walks all objects of the process, whoever made them
    try:
        ready()
        start = time.perf_counter()
        result = run()
        taken = time.perf_counter() - start
    finally:
        gc.enable()
    del result  # freeing the copy is not part of making it
    return taken


def slowest_rank(taken: float) -> float:
    value = torch.tensor(taken, dtype=torch.double)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def one_round(net: nn.Module, rank: int) -> dict[str, float]:
    """Seconds of each contender. Only the broadcast needs rank 1, which waits for it at a barrier."""
    alone: dict[str, Callable[[], object]] = {
        "replicas": lambda: replicas(net, TWO),
        "detached": lambda: replicas(net, TWO, detach=True),
        "deepcopy": lambda: copy.deepcopy(net),
    }
    taken = {name: seconds(run) for name, run in alone.items()} if rank == 0 else {}
    tensors = [p.detach() for p in net.parameters()]
    world = dist.group.WORLD
    broadcast = seconds(lambda: dist._broadcast_coalesced(world, tensors, DDP_BUCKET, 0), dist.barrier)
    taken["broadcast"] = slowest_rank(broadcast)
    return taken


def measured(layers: int, width: int, rounds: int, rank: int) -> dict[str, Any]:
    net = model(layers, width)
    one_round(net, rank)  # the first one pays for pages and connections
    runs = [one_round(net, rank) for _ in range(rounds)]
    if rank != 0:
        return {}
    count = sum(1 for _ in net.parameters())
    row: dict[str, Any] = {"parameters": count, "width": width}
    row["bytes beyond the replicas"] = bytes_beyond_the_replicas(net)
    for name in runs[0]:
        row[f"{name} us per parameter"] = min(run[name] for run in runs) / count * 1e6
    for name in ("deepcopy", "broadcast"):
        row[f"replicas / {name}"] = statistics.median(run["replicas"] / run[name] for run in runs)
    return row


def process(rank: int, store: str, options: argparse.Namespace, results: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # torch's own objects need no collecting, and collecting them takes longer than the runs
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=TIMEOUT)
    try:
        rows = [measured(layers, options.width, options.rounds, rank) for layers in options.layers]
        if rank == 0:
            Path(results).write_text(json.dumps(rows, indent=1))
    finally:
        dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " ---: |" * len(rows[0])]
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of replicas, per parameter.")
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 200, 800], help="two parameters each")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/rows.json"
        mp.spawn(process, args=(f"{folder}/store", options, results), nprocs=2)
        text = Path(results).read_text()
    print(table(json.loads(text)))
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
