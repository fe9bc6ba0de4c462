"""A training step of a GPT under FullyShard, beside torch's own FSDP2, on 2 gloo ranks.

    python benchmarks/fsdp.py [--widths 64 512] [--layers 4] [--rounds 15] [--json PATH]

The contenders are FSDP2 (`fully_shard` on each block and the root, as its tutorial has it), `compile` with
`FullyShard("layers.*")`, and `train_step` of the same plan. They start from the same weights and take turns, one step
each, on the same batches, so a busy machine slows all of them; a ratio is the median over rounds of a step's time to
FSDP2's of the same round. Losses are compared step for step and parameters at the end: a run that does not agree to
1e-4 ends with an error. Memory is counted after every operator: the most bytes of all storages that are alive.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from memory import Live
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardc
from shardc import FullyShard, Plan

RANKS, VOCAB, LENGTH, ROWS = 2, 256, 64, 4  # rows: of each rank
OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3)
Step = Callable[[Tensor, Tensor], float]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def built(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return GPT(width, layers)


def contenders(width: int, layers: int, mesh: Any) -> dict[str, tuple[nn.Module, Any, Step]]:
    theirs = built(width, layers)
    for layer in theirs.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh)
    fully_shard(theirs, mesh=mesh)
    plan = Plan(dp=FullyShard("layers.*"))
    compiled = shardc.compile(built(width, layers), plan, mesh=mesh)
    step = shardc.train_step(built(width, layers), plan, loss_of, OPTIMIZER, mesh=mesh)
    plain = {"fsdp2": theirs, "compile": compiled}
    made: dict[str, tuple[nn.Module, Any, Step]] = {}
    for name, model in plain.items():
        optimizer = OPTIMIZER(model.parameters())
        made[name] = model, optimizer, functools.partial(by_hand, model, optimizer)
    made["train_step"] = step.model, step.optimizer, lambda ids, targets: float(step(ids, targets))
    return made


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor) -> float:
    """A step; the mean of the ranks' losses, which train_step has made inside."""
    optimizer.zero_grad()
    loss = loss_of(model, ids, targets)
    loss.backward()
    optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / RANKS


def run(rank: int, width: int, layers: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    made = contenders(width, layers, mesh)
    times: dict[str, list[float]] = {name: [] for name in made}
    losses: dict[str, list[float]] = {name: [] for name in made}
    peaks: dict[str, int] = {}
    for i in range(rounds + 3):  # the first ones compile, and warm up
        draw = torch.Generator().manual_seed(100 * i + rank)
        ids = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=draw)
        order = list(made)[i % len(made) :] + list(made)[: i % len(made)]
        for name in order:
            model, optimizer, step = made[name]
            gc.collect()
            dist.barrier()
            if i == 2:
                state = [list(s.values()) for s in optimizer.state.values()]
                with Live([list(model.parameters()), state, ids]) as counted:
                    losses[name].append(step(ids[:, :-1], ids[:, 1:]))
                peaks[name] = counted.peak
                continue
            begin = time.perf_counter()
            losses[name].append(step(ids[:, :-1], ids[:, 1:]))
            if i > 2:
                times[name].append(time.perf_counter() - begin)
    agree(made, losses)
    return {
        "width": width,
        "layers": layers,
        "parameters": sum(p.numel() for p in made["fsdp2"][0].parameters()),
        "milliseconds": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(t, times["fsdp2"], strict=True)), 3)
            for name, t in times.items()
        },
        "peak_bytes": peaks,
        "losses": losses,
    }


def agree(made: dict[str, tuple[nn.Module, Any, Step]], losses: dict[str, list[float]]) -> None:
    for name in losses:
        torch.testing.assert_close(losses[name], losses["fsdp2"], rtol=1e-4, atol=1e-5)
        for p, q in zip(made[name][0].parameters(), made["fsdp2"][0].parameters(), strict=True):
            whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in (p, q)]
            torch.testing.assert_close(*whole, rtol=1e-3, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = []
    for width in asked.widths:
        first, *_ = shardc.launch(run, nproc=RANKS, args=(width, asked.layers, asked.rounds))
        found.append(first)
        print(f"GPT of {asked.layers} layers, width {width}, {first['parameters']:,} parameters, {RANKS} ranks")
        for name, ms in first["milliseconds"].items():
            peak = first["peak_bytes"][name]
            print(f"  {name:<11} {ms:8.1f} ms  x {first['ratio'][name]:.2f}  peak {peak / 2**20:7.2f} MiB")
        print(f"  losses agree over {len(first['losses']['fsdp2'])} steps")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
