"""Plans found by search: which, what they cost, and that they are right; then the time that a search takes.

    python benchmarks/plans/search.py [--models PATTERN]    eleven small models: plans found, verified
    python benchmarks/plans/search.py --large               Llama 3 at published shapes, 64 and 1,024 ranks

Small models: on a mesh of 2 x 2, without a limit, and with four fifths of what that takes. Each plan is compiled and
simulated, and outputs and gradients are compared with one device. Peak: what the search says over what the compiled
program counts with Adam's two moments. Large models: on meta; seconds after the trace, and MiB more than before it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from various import MODELS, Config, Llama

import shardc
from shardc import Mesh, Program
from shardc.compiler.driver.decide import Options
from shardc.compiler.driver.search.search import Search

LARGE = {
    "llama 8b, 8 x 8": (Config(), 64, 4096, Mesh(dp=8, tp=8)),
    "llama 70b, 128 x 8": (Config(8192, 80, 64, 8, 28672), 1024, 4096, Mesh(dp=128, tp=8)),
}


def adam_bytes(program: Program) -> int:
    return program.peak_bytes() + sum(2 * row["bytes_per_rank"] for row in program.plan.report())


def small(name: str) -> list[dict[str, Any]]:
    rows, limit = [], None
    for _ in range(2):
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        start = time.perf_counter()
        row: dict[str, Any] = {"model": name, "limit": limit or 0}
        try:
            found = shardc.search(model, Mesh(dp=2, tp=2), inputs, memory=limit)
        except shardc.PlanError as error:
            rows.append(row | {"refused": error.what})
            break
        row |= {"seconds": time.perf_counter() - start, "compared": found.tried, "step": found.seconds}
        options = {"recompute": found.recompute} if found.recompute else {}
        program = shardc.compile(model, found.plan, mesh=Mesh(dp=2, tp=2), **options).lower(*inputs)
        row |= {"peak": found.peak_bytes, "over": found.peak_bytes / adam_bytes(program)}
        row |= {"differs": float(program.verify(*inputs)), "plan": repr(found.plan), "recompute": list(found.recompute)}
        rows.append(row)
        limit = 0.8 * found.peak_bytes
    return rows


def large(name: str) -> dict[str, Any]:
    config, rows, length, mesh = LARGE[name]
    with torch.device("meta"):
        model, ids = Llama(config), torch.zeros(rows, length, dtype=torch.long)
    moments: dict[str, tuple[float, float]] = {}

    def tell(text: str, count: int) -> None:
        moments.setdefault(text, (time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    machine = shardc.Hardware.preset("h100")
    one = Search(model, mesh, Options(hardware=machine), machine.capacity, tell=tell)
    start = time.perf_counter()
    found = one.run((ids,), {})
    end, mib = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    traced, before = moments["comparing plans"]
    return {
        "case": name, "trace": traced - start, "search": end - traced, "compared": found.tried, "step": found.seconds,
        "more_mib": mib - before, "peak": found.peak_bytes, "plan": repr(found.plan),
        "recompute": list(found.recompute),
    }  # fmt: skip


def in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--one", help="run one large case here and print it as JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(large(options.one)))
        return
    rows: list[dict[str, Any]] = []
    for name in LARGE if options.large else fnmatch.filter(MODELS, options.models):
        for row in [in_a_process(name)] if options.large else small(name):
            rows.append(row)
            print(
                *(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()),
                sep=" | ",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
