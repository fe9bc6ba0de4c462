"""Milliseconds per step (forward, loss, backward) of every way to run one parallelism, side by side.

    python benchmarks/step_time.py [--sizes small large] [--ways REGEX] [--rounds 40] [--json PATH]

All ways live in the same two gloo ranks of one thread each and take turns within each round, in another order every
time, so that what disturbs the machine disturbs all of them. A time is the slower rank's; shown are the median over
rounds and the span of the middle half. A bar is a ratio of two medians of one run.

The first step of a way that uses inductor is timed in processes and with a cache folder of its own, shared by the two
ranks: what one way has compiled must not help the next. What inductor finds out about the machine once (which vector
instructions there are) is done before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from models.gpt import GPT, SHAPES, batch_of
from ways import WAYS, given, make

from shardc import launch


class Bar(NamedTuple):
    """A ratio of medians and what it should be at most, by size; None where nothing is asked."""

    way: str
    beside: str
    small: float | None
    large: float | None


BARS = (
    Bar("tp shardc", "tp dtensor", 0.42, 0.87),
    Bar("tp shardc", "tp dtensor aot_eager", 0.80, 1.0),
    Bar("tp shardc inductor", "tp dtensor inductor", 0.95, 1.0),
    Bar("dp shardc", "dp ddp", 1.0, 1.0),
    Bar("fsdp shardc", "fsdp fsdp2", 0.60, 0.75),
    Bar("tp shardc", "tp floor", 1.10, 1.10),
    Bar("dp shardc", "dp floor", 1.10, 1.10),
    Bar("fsdp shardc", "fsdp floor", 1.10, 1.10),
    Bar("tp shardc train_step", "tp dtensor + optim", 0.5, None),
)
FIRST = Bar("tp shardc inductor", "tp dtensor inductor", 0.5, 0.5)  # of the seconds up to the first step


def measure(rank: int, names: list[str], size: str, rounds: int, warm: int) -> dict[str, Any]:
    """On one rank: {"steps": seconds by way and round, "first": seconds by way, "losses": by way}."""
    world, shape = dist.get_world_size(), SHAPES[size]
    torch.manual_seed(0)
    model, batch = GPT(shape), batch_of(shape)
    steps, first, losses = {}, {}, {}
    for name in names:
        mesh, mine = given(name, batch, rank, world)
        dist.barrier()
        start = time.perf_counter()
        step = make(name, model, mesh, rank, world)
        losses[name] = step(*mine).item()
        first[name] = time.perf_counter() - start
        for _ in range(warm):
            step(*mine)
        steps[name] = (step, mine)
    times: dict[str, list[float]] = {name: [] for name in names}
    order, draw = list(names), random.Random(0)
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            step, mine = steps[name]
            gc.collect(0)
            gc.disable()
            dist.barrier()
            start = time.perf_counter()
            step(*mine)
            times[name].append(time.perf_counter() - start)
            gc.enable()
    return {"steps": times, "first": first, "losses": losses}


def first_step(rank: int, name: str, size: str) -> float:
    """Seconds up to the end of the first step, in a process that has made none."""
    torch.compile(lambda x: x + 1)(torch.ones(3))
    return measure(rank, [name], size, 0, 0)["first"][name]


def fresh(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """What `fn` returns on two ranks for which inductor's cache is empty."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        return launch(fn, 2, args, timeout=3000)


def summary(found: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, float]]:
    """By way: milliseconds per step (median and quartiles, of the slower rank), and seconds to the first step."""
    out = {}
    for name in names:
        slower = [1000 * max(times) for times in zip(*(one["steps"][name] for one in found), strict=True)]
        low, middle, high = statistics.quantiles(slower, n=4)
        first = max(one["first"][name] for one in found)
        out[name] = {"ms": middle, "low": low, "high": high, "first_s": first, "loss": found[0]["losses"][name]}
    return out


def report(size: str, rows: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    print(f"\n{size}: {SHAPES[size]}\n{'way':26s} {'ms':>8s}  {'middle half':>15s}  {'first step s':>12s}")
    for name, row in rows.items():
        print(f"{name:26s} {row['ms']:8.2f}  {row['low']:6.2f} - {row['high']:6.2f}  {row['first_s']:12.2f}")
    print(f"\n{'ratio of medians':48s} {'found':>6s} {'bar':>6s}")
    bars = []
    for bar, key in [*((bar, "ms") for bar in BARS), (FIRST, "first_s")]:
        limit = getattr(bar, size)
        if limit is None or bar.way not in rows or bar.beside not in rows:
            continue
        ratio = rows[bar.way][key] / rows[bar.beside][key]
        what = f"{bar.way} : {bar.beside}{', first step' if key == 'first_s' else ''}"
        print(f"{what:48s} {ratio:6.2f} {limit:6.2f} {'' if ratio <= limit else 'missed'}")
        bars.append({"size": size, "what": what, "ratio": ratio, "bar": limit})
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--ways", default="", help="a regular expression that their names contain")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in WAYS if re.search(options.ways, name)]
    result: dict[str, Any] = {"torch": torch.__version__, "rounds": options.rounds, "sizes": {}, "bars": []}
    for size in options.sizes:
        rows = summary(fresh(measure, names, size, options.rounds, options.warm), names)
        for name in (name for name in names if "inductor" in name):
            rows[name]["first_s"] = max(fresh(first_step, name, size))
        result["sizes"][size] = rows
        result["bars"] += report(size, rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
