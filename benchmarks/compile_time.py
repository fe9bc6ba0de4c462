"""What compiling costs: seconds by phase and peak memory, from a model on meta, on one process without a GPU.

    python benchmarks/compile_time.py [--cases REGEX] [--json PATH]

Each case is a process of its own, one after another. Cases: the benchmarks' GPT of 2, 24 and 96 layers, tensor
parallel over 2 ranks, and Llama 3 at the published shape of 8B, fully sharded and tensor parallel, on meshes of 8, 64
and 1,024 ranks. Phases: trace (torch's part included), passes (with the checks and texts after each), rest (copies,
keys, the two halves). CPU s is what the process itself was given, on a machine that others use too. Memory is the
process's peak resident size; torch alone takes about 300 MiB of it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models.gpt import GPT, Shape, tensor_parallel
from models.llama import Config, Llama, plan

import shardc
from shardc import Mesh, Plan
from shardc.compiler.trace.trace import trace

LAYERS = (2, 24, 96)
MESHES = {8: dict(dp=2, tp=4), 64: dict(dp=8, tp=8), 1024: dict(dp=128, tp=8)}
CASES = [*(f"gpt {n} layers" for n in LAYERS), *(f"llama 8b {n} ranks" for n in MESHES)]


def case(name: str) -> tuple[torch.nn.Module, Plan, Mesh, torch.Tensor]:
    number = int(re.findall(r"(\d+) (?:layers|ranks)", name)[0])
    with torch.device("meta"):
        if name.startswith("gpt"):
            shape = Shape(width=64, heads=4, layers=number)
            ids = torch.zeros(shape.batch, shape.length, dtype=torch.long)
            return GPT(shape), Plan(tp=tensor_parallel()), Mesh(tp=2), ids
        return Llama(Config()), plan(), Mesh(**MESHES[number]), torch.zeros(128, 2048, dtype=torch.long)


def run(name: str) -> dict[str, Any]:
    traced: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return trace(*args, **kwargs)
        finally:
            traced.append(time.perf_counter() - start)

    model, wishes, mesh, ids = case(name)
    start, busy = time.perf_counter(), time.process_time()
    compiled = shardc.compile(model, wishes, mesh=mesh, init={})  # values come later, if at all
    compiled._bound.lowering.tracing.trace = timed
    program = compiled.lower(ids)
    parts = program.halves
    total = time.perf_counter() - start
    passes = {}
    for record in program.records:
        passes[record.name] = passes.get(record.name, 0) + record.seconds
    spent = sum(passes.values())
    return {
        "case": name,
        "nodes": len(program.gm.graph.nodes),
        "saved": len(parts.saved),
        "seconds": total,
        "cpu": time.process_time() - busy,
        "trace": sum(traced),
        "passes": spent,
        "rest": total - sum(traced) - spent,
        "by_pass": passes,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, text=True, timeout=590, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="a regular expression that their names contain")
    parser.add_argument("--one", help="run one case here and print it as JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one)))
        return
    columns = "".join(f" {name:>7s}" for name in ("nodes", "seconds", "CPU s", "trace", "passes", "rest", "MiB"))
    print(f"{'case':20s}{columns}")
    rows: dict[str, dict[str, Any]] = {}
    for name in CASES:
        if not re.search(options.cases, name):
            continue
        row = rows[name] = in_a_process(name)
        numbers = "".join(f" {row[key]:7.2f}" for key in ("seconds", "cpu", "trace", "passes", "rest"))
        print(f"{name:20s} {row['nodes']:7d}{numbers} {row['peak_mib']:7.0f}", flush=True)
    bars(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


def bars(rows: dict[str, dict[str, Any]]) -> None:
    def line(what: str, found: float, bar: float) -> None:
        print(f"{what:44s} {found:8.2f} {bar:8.2f} {'' if found <= bar else 'missed'}")

    print(f"\n{'':44s} {'found':>8s} {'bar':>8s}")
    for name, row in rows.items():
        line(f"{name}: passes over trace", row["passes"] / row["trace"], 1.0)
        if "llama" in name:
            line(f"{name}: seconds", row["seconds"], 25)
            line(f"{name}: GiB", row["peak_mib"] / 1024, 1.5)
    if {"gpt 24 layers", "gpt 96 layers"} <= set(rows):
        line("gpt 96 layers: seconds", rows["gpt 96 layers"]["seconds"], 60)
        line("gpt 96 : 24 layers", rows["gpt 96 layers"]["seconds"] / rows["gpt 24 layers"]["seconds"], 4.2)
    if {"llama 8b 8 ranks", "llama 8b 1024 ranks"} <= set(rows):
        ratio = rows["llama 8b 1024 ranks"]["seconds"] / rows["llama 8b 8 ranks"]["seconds"]
        line("llama 8b, 1024 : 8 ranks", ratio, 1.1)


if __name__ == "__main__":
    main()
