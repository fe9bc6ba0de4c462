"""What the user asked to be computed again in backward, marked in a traced graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from shardc.compiler.ir.node import of
from shardc.compiler.plan.match import find


def mark_recomputed(gm: GraphModule, patterns: Sequence[str]) -> None:
    """What lies in the modules that the user asked to recompute is of a region, of the outermost such module."""
    known: dict[str, str] = {}
    for node in gm.graph.nodes:
        view = of(node)
        if node.op == "call_function" and view.phase == "forward" and not view.region:
            if view.path not in known:
                known[view.path] = _recomputed_as(view.path, patterns)
            view.region = known[view.path]


def _recomputed_as(path: str, patterns: Sequence[str]) -> str:
    parts = path.split(".")
    prefixes = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    found = (p for p in prefixes if any(find(pattern, [p]) for pattern in patterns))
    return next(("the root" if prefix == "" else prefix for prefix in found), "")
