"""What it takes to look up an operator's rule and to infer its layout: microseconds per node, the median of a program.

    python benchmarks/infer.py [--layers 12] [--runs 5]

The program is the joint graph of a GPT-like stack, its weights split by columns and rows. A lowering keeps what it has
decided, so most nodes are looked up; beside the median of all stand those of the nodes that were not, and of the same
nodes without anything kept.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.fx import Node

import shardc
from shardc import Mesh
from shardc.compiler.infer.decisions import Decisions, call_rule, decide_node
from shardc.compiler.ir.node import operands, spec


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False)
    plan = shardc.Plan(
        dp=shardc.Replicated(),
        tp={"layers.*.linear1": ColwiseParallel(), "layers.*.linear2": RowwiseParallel()},
    )
    mesh = shardc.Mesh(dp=2, tp=2)
    program = shardc.compile(model, plan, mesh=mesh).lower(torch.randn(4, 8, 32))
    gc.disable()  # as while a program is lowered
    calls = [n for n in program.global_gm.graph.nodes if n.op == "call_function" and "wants" in n.meta]
    print(f"{len(calls)} nodes, each with the best of {options.runs} runs; microseconds")
    alone = best(calls, mesh, options.runs, lambda: None)
    print(f"each by itself:          median {statistics.median(alone):4.0f}, slowest {max(alone):4.0f}")
    times = best(calls, mesh, options.runs, Decisions)
    print(f"as a program is lowered: median {statistics.median(times):4.0f}, slowest {max(times):4.0f}")
    new = first_times(calls, mesh)
    firsts, repeats = ([t for t, is_new in zip(times, new, strict=True) if is_new is kind] for kind in (True, False))
    for what, group in (("decided for the first time", firsts), ("decided before", repeats)):
        share = len(group) / len(calls)
        print(f"    {share:4.0%} {what + ':':28s} median {statistics.median(group):4.0f}, slowest {max(group):4.0f}")


def best(calls: list[Node], mesh: Mesh, runs: int, known: Callable[[], Decisions | None]) -> list[float]:
    """Per node the microseconds of its fastest run. known: what a run begins with, knowing nothing yet."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        decisions = known()
        for times, node in zip(taken, calls, strict=True):
            times.append(decide(node, mesh, decisions))
    return [min(times) for times in taken]


def first_times(calls: list[Node], mesh: Mesh) -> list[bool]:
    """Which nodes had to be decided anew."""
    decisions, out = Decisions(), []
    for node in calls:
        before = len(decisions)
        decide(node, mesh, decisions)
        out.append(len(decisions) > before)
    return out


def decide(node: Node, mesh: Mesh, known: Decisions | None) -> float:
    layouts = [spec(n) for n in operands(node)]
    node.meta.pop("rule", None)
    begin = time.perf_counter()
    call_rule(node, known)
    decide_node(node, layouts, mesh, known=known)
    return 1e6 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
