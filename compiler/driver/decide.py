"""Decides: a traced module goes through all passes and comes out as a program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from shardc.compiler.analysis.lowered import input_names
from shardc.compiler.analysis.program import Program
from shardc.compiler.infer.averages import Averages
from shardc.compiler.ir.graph import copy_graph, returned
from shardc.compiler.ir.node import spec
from shardc.compiler.ir.signature import OutputKind, Traced
from shardc.compiler.pipeline.runner import Context, Runner
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.pipeline.torch_trace import log_passes
from shardc.compiler.rules.ops import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.passes.pipeline import pipeline


def decide(traced: Traced, ctx: Context, original: Any = None) -> Program:
    """Run the whole pipeline on a traced module (its graph is consumed)."""
    gm, names = traced.gm, input_names(ctx.signature)
    global_gm = gm
    runner, records = Runner(gm, ctx, names), []
    for step in pipeline(ctx):
        if step.gives >= Stage.LOCAL and global_gm is gm:
            global_gm = copy_graph(gm)
        records.append(runner.run(step))
    log_passes(records)
    return Program(gm, global_gm, ctx.signature, ctx.mesh, ctx.plan, records, original, _averages(gm, ctx))


def _averages(gm: GraphModule, ctx: Context) -> Averages:
    if not ctx.average:
        return Averages()
    ends = zip(returned(gm), ctx.signature.outputs, strict=True)
    layouts = {i: spec(n) for i, (n, e) in enumerate(ends) if e.kind is OutputKind.OUTPUT and isinstance(n, Node)}
    found = Averages.of(layouts, ctx.signature, ctx.plan, ctx.mesh)
    return replace(found, later=ctx.keep)
