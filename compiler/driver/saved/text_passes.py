"""Passes on a program's text: what `shardc opt` does, and how a module becomes such a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardc.compiler.driver.compiled_module import CompiledModule
from shardc.compiler.errors import PlanError
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.signature import Traced
from shardc.compiler.ir.text import input_names, text
from shardc.compiler.ir.text.full import full_text
from shardc.compiler.ir.text.reader import read
from shardc.compiler.pipeline.runner import Context, Runner
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.plan.call_layouts import CallLayouts
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.rules.ops import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.passes.pipeline import pipeline

FROM_PLAN = {  # passes that ask the plan what no text holds
    "seed-plan": "how parameters, inputs and modules are to lie",
    "choose-factors": "which splits are open",
}
STAGES = {stage.name: stage for stage in Stage}


@dataclass
class Between:
    """A program between two passes. ran: how many of the pipeline's are behind it, None where nobody knows; planned:
    whether the whole plan is at hand."""

    traced: Traced
    ctx: Context
    stage: Stage
    ran: int | None
    planned: bool = False

    def text(self) -> str:
        """All that is known of it."""
        plan, ctx = self.ctx.plan, self.ctx
        head = {"data": plan.data_axes, "buckets": plan.bucket_bytes, "reduce": plan.reduce_dtype}
        return full_text(self.traced, ctx.mesh, self.stage.name, ran=self.ran, strict=ctx.strict, rng=ctx.rng, **head)

    def plain(self) -> str:
        """As a program is printed."""
        return text(self.traced.gm, self.ctx.mesh, input_names(self.ctx.signature))

    def run(self, name: str = "", until: str = "") -> None:
        """The pass of this name, or those of the pipeline that come next, up to a pass or to the end of a stage.
        Raises PlanError where there is none, or where it cannot run here."""
        steps, stop = pipeline(self.ctx), STAGES.get(until)
        first = self.ran if self.ran is not None else next(i for i, s in enumerate(steps) if s.takes >= self.stage)
        ends = [i for i, s in enumerate(steps) if s.name == until or (stop is not None and s.gives <= stop)]
        found = [step for step in steps if step.name == name][:1] or steps[first : max(ends, default=-1) + 1]
        if not found:
            raise PlanError(f"no pass of the pipeline is, or leads to, {name or until}", help="shardc opt --list")
        for step in found:
            self._run(step)
        known = not name or steps[first : first + 1] == found
        self.ran = first + len(found) if known else None

    def _run(self, step: Any) -> None:
        if step.name in FROM_PLAN and not self.planned:
            raise PlanError(
                f"{step.name} cannot run on a text: it asks the plan {FROM_PLAN[step.name]}",
                help=f"run it where the plan is: shardc opt --from file.py:function --mesh ... --until {step.name}",
            )
        if step.takes > self.stage or step.gives < self.stage:
            raise PlanError(f"{step.name} takes a program that is {step.takes.name}, and this one is {self.stage.name}")
        runner = Runner(self.traced.gm, self.ctx, input_names(self.ctx.signature), self.stage)
        self.stage = runner.run(step).stage


def of_call(compiled: CompiledModule, *args: Any, **kwargs: Any) -> Between:
    """As traced, of a module that was just compiled."""
    program, lowering = compiled.lower(*args, **kwargs), compiled._bound.lowering
    (traced,) = lowering.tracing.traces.made.values()
    ctx = Context(
        program.mesh, program.plan, program.signature, rng=lowering.options.rng, without=lowering.options.without
    )
    return Between(Traced(copy_graph(traced.gm), program.signature), ctx, Stage.TRACED, 0, planned=True)


def of_text(content: str, name: str, stage: str = "TRACED") -> Between:
    """Raises PlanError for what is no program, ShardingError for one that breaks its stage's invariants. stage: of a
    text that does not say it itself."""
    written = read(content, name, stage)
    mesh, head, at = written.mesh, written.head, STAGES.get(written.head["stage"])
    data, buckets, reduce = head.get("data", ()), head.get("buckets", {}), head.get("reduce", {})
    fits = all(isinstance(dtype, torch.dtype | None) for dtype in reduce.values())
    if at is None or not fits or not all(isinstance(size, int) for size in buckets.values()):
        raise PlanError("no such stage, or no such options", where=f"{name}:1")
    verify(written.traced.gm, at, mesh)
    calls = CallLayouts(None, None, lambda x: x, mesh.names)
    plan = Resolved(mesh, {}, {}, (), {}, {}, data, buckets, reduce, calls)
    options = {key: head[key] for key in ("strict", "rng") if key in head}
    return Between(written.traced, Context(mesh, plan, written.traced.signature, **options), at, head.get("ran"))


def passes() -> list[Any]:
    """Of the pipeline, in order."""
    return pipeline(of_text("mesh\nreturn ()", "").ctx)
