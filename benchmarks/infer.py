"""What it takes to look up an operator's rule and to infer its layout: microseconds per node, the median of a program.

    python benchmarks/infer.py [--layers 12] [--runs 5]

The program is the joint graph of a GPT-like stack, with its batch split and its weights split by columns and rows.
"""

import argparse
import statistics
import time
import warnings

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc.compiler.graph import operands, spec
from shardc.compiler.infer import call_rule, decide_node


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
    calls = [n for n in program.global_gm.graph.nodes if n.op == "call_function" and "wants" in n.meta]
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(options.runs):
        for times, node in zip(taken, calls, strict=True):
            layouts = [spec(n) for n in operands(node)]
            node.meta.pop("rule", None)
            begin = time.perf_counter()
            call_rule(node)
            decide_node(node, layouts, mesh)
            times.append(1e6 * (time.perf_counter() - begin))
    best = [min(times) for times in taken]
    print(f"{len(calls)} nodes: median {statistics.median(best):.0f} us, slowest {max(best):.0f} us")


if __name__ == "__main__":
    main()
