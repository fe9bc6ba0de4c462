"""A graph as golden text: one line per value with its layout in its type."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.node import of, specs, target_name, tensors, val
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import Number, named_shape
from shardc.compiler.spec.spec import DTYPES, Spec


def text(gm: GraphModule, mesh: Mesh, names: dict[str, str] | None = None) -> str:
    """The whole program. names: what each placeholder is, by node name ("param layers.0.w")."""
    lines = [str(mesh)]
    lines += [line for node in gm.graph.nodes if (line := node_text(node, names or {}))]
    return "\n".join(lines)


def node_text(node: Node, names: dict[str, str] | None = None) -> str:
    """One line: `%mm: f32[8@dp, 16]+tp = aten.mm(%x, %w)`."""
    if node.op == "output":
        return f"return {arg_text(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name}: {type_text(node)} = {(names or {}).get(node.name, 'input')}"
    items = [arg_text(a) for a in node.args]
    items += [f"{k}={arg_text(v)}" for k, v in node.kwargs.items()]
    made_by = f"  # {of(node).made_by}" if of(node).made_by else ""
    return f"%{node.name}: {type_text(node)} = {target_name(node.target)}({', '.join(items)}){made_by}"


def type_text(node: Node) -> str:
    """`f32[8@dp, 16]+tp`, or several of them in parentheses."""
    if isinstance(val(node), Number):
        return str(val(node))
    values = tensors(node) or tensors_in(of(node).local)
    layouts = specs(node) or tuple(Spec.whole(named_shape(t)) for t in values)
    if len(layouts) != len(values):
        return "?"
    texts = [layout.text(t.dtype) for layout, t in zip(layouts, values, strict=True)]
    return texts[0] if len(texts) == 1 and not isinstance(val(node), (tuple, list)) else f"({', '.join(texts)})"


def arg_text(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        inner = ", ".join(arg_text(a) for a in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
    if isinstance(arg, torch.dtype):
        return DTYPES.get(arg, str(arg))
    return str(arg)


def excerpt(node: Node, before: int = 1) -> str:
    """The lines around a node, its own marked `>`."""
    shown = [n for n in node.graph.nodes if n.op == "call_function"]
    at = shown.index(node) if node in shown else 0
    lines = [f"  {node_text(n)}" for n in shown[max(0, at - before) : at]]
    return "\n".join([*lines, f"> {node_text(node)}"])
