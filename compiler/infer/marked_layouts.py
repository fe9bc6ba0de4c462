"""Layouts of inputs and outputs, and counts of values, as the marks in a graph show them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes, inputs_of
from shardc.compiler.ir.marks import MARK, parse_key
from shardc.compiler.ir.node import shape
from shardc.compiler.ir.signature import InputKind, Signature
from shardc.compiler.plan.resolved import Resolved


def input_layout(node: Node, name: str, plan: Resolved, rows: int | None = 0) -> dict[str, Any]:
    """Mesh dim -> placement of a root input. rows: along which dim it is split with the batch, if nobody says."""
    return plan.root_layout("in", name, len(shape(node)), _met("in", node), rows)


def output_layout(
    node: Node, name: str, plan: Resolved, rows: int | None = 0, lengths: Mapping[str, int | None] | None = None
) -> dict[str, Any]:
    """Mesh dim -> placement of a root output, likewise. lengths: along which dims it is split with the sequence."""
    return plan.root_layout("out", name, len(shape(node)), _met("out", node), rows, lengths or {})


def told(side: Literal["in", "out"], name: str, node: Node, plan: Resolved) -> dict[str, Any] | None:
    """How a root input or output lies over the data-parallel mesh dims, where somebody says so."""
    return plan.told(side, name, len(shape(node)), _met(side, node))


def _met(side: str, node: Node) -> list[str]:
    """The marks of a root input or output."""
    marks = [user for user in node.users if user.target is MARK] if side == "in" else [node]
    return [_key(mark) for mark in marks if mark.target is MARK]


def input_layouts(gm: GraphModule, signature: Signature, plan: Resolved) -> dict[int, dict[str, Any]]:
    """input_layout of every BATCH input, by position among the inputs."""
    found = zip(signature.indices(InputKind.BATCH), inputs_of(gm, signature, InputKind.BATCH), strict=True)
    return {i: input_layout(node, entry.name, plan, None if entry.rows is False else 0) for i, (entry, node) in found}


def check_counts(gm: GraphModule, plan: Resolved) -> None:
    """Raises PlanError where more values cross a module's border than its style has layouts for."""
    for mark in call_nodes(gm, MARK):
        key = parse_key(_key(mark))
        position = re.match(r"\d+", key.path)
        wanted = plan.counts.get((key.fqn, key.kind))
        if wanted is not None and position and int(position[0]) >= wanted and not key.grad:
            plan.check_count(key.fqn, "in" if key.kind == "in" else "out", int(position[0]) + 1)


def _key(mark: Node) -> str:
    return str(mark.args[1])
