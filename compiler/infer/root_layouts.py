"""The layouts of a root input or output: the caller's word, else what the module it feeds says, else the default."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes, inputs_of
from shardc.compiler.ir.marks import MARK, parse_key
from shardc.compiler.ir.node import shape
from shardc.compiler.ir.signature import InputKind, Output, Signature

if TYPE_CHECKING:
    from shardc.compiler.plan.resolved import Resolved


def input_layout(node: Node, name: str, plan: Resolved) -> dict[str, Any]:
    """Mesh dim -> placement of a root input. A root style, or a layout the user wrote on a module that is fed
    by this input itself, describes what is passed in; defaults of styles do not."""
    layout: dict[str, Any] = dict(plan.input_layout(name, len(shape(node))))
    if plan.roots.says_input(name):
        return layout
    return layout | _declared([u for u in node.users if u.target is MARK], "|in|", plan)


def output_layout(node: Node, entry: Output, plan: Resolved) -> dict[str, Any]:
    """Mesh dim -> placement of a root output, likewise."""
    layout: dict[str, Any] = dict(plan.output_layout(entry.name, len(shape(node))))
    if plan.roots.says_output(entry.name):
        return layout
    return layout | _declared([node] if node.target is MARK else [], "|out|", plan)


def input_layouts(gm: GraphModule, signature: Signature, plan: Resolved) -> dict[int, dict[str, Any]]:
    """input_layout of every BATCH input, by position among the inputs."""
    found = zip(signature.indices(InputKind.BATCH), inputs_of(gm, signature, InputKind.BATCH), strict=True)
    return {i: input_layout(node, entry.name, plan) for i, (entry, node) in found}


def needs_trace(plan: Resolved) -> bool:
    """Whether what a root input is can only be known from the graph: some inner module's style says it explicitly."""
    return any(b.side == "in" and b.explicit and b.module for b in plan.boundaries)


def border_layout(name: str, head: str, ndim: int, plan: Resolved) -> dict[str, Any]:
    """input_layout before there is a graph: by the argument's readable path and its path at the root's border."""
    layout: dict[str, Any] = dict(plan.input_layout(name, ndim))
    if plan.roots.says_input(name):
        return layout
    said = [b for b in plan.at(f"|in|{head}") if b.declared is not None]
    return layout | {b.axis: b.declared for b in said}


def check_counts(gm: GraphModule, plan: Resolved) -> None:
    """Raises PlanError where more values cross a module's border than its style has layouts for."""
    for mark in call_nodes(gm, MARK):
        key = parse_key(str(mark.args[1]))
        position = re.match(r"\d+", key.path)
        wanted = plan.counts.get((key.fqn, key.kind))
        if wanted is not None and position and int(position[0]) >= wanted and not key.grad:
            plan.check_count(key.fqn, "in" if key.kind == "in" else "out", int(position[0]) + 1)


def _declared(marks: list[Node], side: str, plan: Resolved) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for mark in marks:
        key: str = mark.args[1]  # pyright: ignore[reportAssignmentType]
        if side not in key or key.endswith("|grad"):
            continue
        for said in plan.at(key):
            layout = said.declared if side == "|in|" else said.desired
            if layout is not None and (said.module == "" or said.explicit):
                out.setdefault(said.axis, layout)
    return out
