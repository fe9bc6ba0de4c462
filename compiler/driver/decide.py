"""Decides: a traced module goes through all passes and comes out as a program."""

from __future__ import annotations

from typing import Any

from shardc.compiler.analysis.program import Program
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.signature import Traced
from shardc.compiler.ir.text import input_names
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
    return Program(gm, global_gm, ctx.signature, ctx.mesh, ctx.plan, records, original)
