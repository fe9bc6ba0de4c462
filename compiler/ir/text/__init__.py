"""A graph as golden text: one line per value with its layout in its type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.node import of, specs, target_name, tensors, val
from shardc.compiler.ir.signature import InputKind, Signature
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import Number, named_shape
from shardc.compiler.spec.spec import DTYPES, Spec

WORDS = {kind: kind.value for kind in InputKind} | {InputKind.PARAMETER: "param", InputKind.BATCH: "input"}


def input_names(signature: Signature) -> dict[str, str]:
    """What each placeholder is, for the program's text."""
    of = {e.node: f"of output {e.of}" if e.kind is InputKind.TANGENT else e.name for e in signature.inputs}
    return {e.node: f"{WORDS[e.kind]} {of[e.node]}".strip() for e in signature.inputs}


def text(gm: GraphModule, mesh: Mesh, names: Mapping[str, str] | None = None) -> str:
    """The whole program. names: what each placeholder is, by node name ("param layers.0.w")."""
    return "\n".join([str(mesh), *(str(line(node, names)) for node in gm.graph.nodes)])


def arg_text(arg: Any) -> str:
    """As it is shown; `literal` is as it is read."""
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        inner = ", ".join(arg_text(a) for a in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
    if isinstance(arg, torch.dtype):
        return DTYPES.get(arg, str(arg))
    return str(arg)


class Line(NamedTuple):
    """Of a text: a value's name, its type, and what it is made by. What is returned is the value `return`."""

    name: str
    type: str
    made: str

    def __str__(self) -> str:
        return f"%{self.name}: {self.type} = {self.made}" if self.type else f"{self.name} {self.made}"


def line(node: Node, names: Mapping[str, str] | None = None, show: Callable[[Any], str] = arg_text) -> Line:
    """`%mm: f32[8@dp, 16]+tp = aten.mm(%x, %w)`"""
    if node.op == "output":
        return Line("return", "", show(node.args[0]))
    if node.op == "placeholder":
        return Line(node.name, type_text(node), (names or {}).get(node.name, "input"))
    items = [show(a) for a in node.args]
    items += [f"{k}={show(v)}" for k, v in node.kwargs.items()]
    made_by = f"  # {of(node).made_by}" if of(node).made_by else ""
    return Line(node.name, type_text(node), f"{target_name(node.target)}({', '.join(items)}){made_by}")


def node_text(node: Node, names: Mapping[str, str] | None = None) -> str:
    return str(line(node, names))


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


def excerpt(node: Node, before: int = 1) -> str:
    """The lines around a node, its own marked `>`."""
    shown = [n for n in node.graph.nodes if n.op == "call_function"]
    at = shown.index(node) if node in shown else 0
    lines = [f"  {node_text(n)}" for n in shown[max(0, at - before) : at]]
    return "\n".join([*lines, f"> {node_text(node)}"])
