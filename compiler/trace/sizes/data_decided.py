"""Tracing where data decides sizes and numbers: `x[mask]`, `torch.nonzero(x)`, `x.item()`.

torch stands a symbol in for each (`u0`), and refuses a branch on one. What forward relies on beyond that (two such
sizes that are equal) it records, and the program checks it when it runs. Only a module that cannot be traced
otherwise is traced so: a symbol costs its values their layouts.

In our graph a symbol is a name with a bound (`sizes.py`), and calls that give numbers stand as nodes of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.passes.runtime_assert import insert_deferred_runtime_asserts

from shardc.compiler.rules.facts import ASSERT
from shardc.compiler.spec.sizes import DataSize, Number, name_shape
from shardc.compiler.trace.torch_internals import FakeTensorMode

SYMBOLIC = (SymInt, SymFloat, SymBool)
KINDS = {SymInt: "int", SymFloat: "float", SymBool: "bool"}
DTYPES = {"int": torch.int64, "bool": torch.int64, "float": torch.float64}
NO_BOUND = 2**40  # what torch states beyond this is the largest integer, not a bound
WRONG = "what tensors hold makes other sizes than this program is for"
MADE = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_storage_offset.default)


def data_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def as_tensor(leaf: Any) -> Tensor:
    """A number that a program returns, as a tensor without dims; of a bool, 1 or 0."""
    number = torch.sym_ite(leaf, 1, 0) if isinstance(leaf, SymBool) else leaf
    return torch.full((), number, dtype=DTYPES[KINDS[type(leaf)]])


def decides(nodes: Iterable[Node], needed: Container[Node]) -> bool:
    """Whether data decides a size or number that is needed, or one that forward says is so and so many."""
    for node in nodes:
        value = node.meta.get("val")
        if _symbolic(value) and (node in needed or (isinstance(value, SYMBOLIC) and not value.node.expr.free_symbols)):
            return True
    return False


def with_checks(gm: GraphModule) -> GraphModule:
    """torch's joint graph with a check of everything that tracing took for granted about symbols."""
    env = next((n.node.shape_env for n in _symbols(gm)), None)
    if env is not None:
        insert_deferred_runtime_asserts(gm, env, "shardc")
    return gm


def _symbols(gm: GraphModule) -> Iterator[Any]:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for leaf in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(leaf, SYMBOLIC):
                yield leaf


def is_needed(node: Node) -> bool:
    """Whether a check says something that is not so by itself: no size is below zero, no bool but 0 and 1."""
    if node.target is not ASSERT:
        return False
    holds = node.args[0]
    if not isinstance(holds, Node):
        return holds is not True
    of = holds.args[0].target if holds.args and isinstance(holds.args[0], Node) else None
    return of is not torch.sym_ite and not (of in MADE and holds.target is operator.ge and holds.args[1] == 0)


class Settled:
    """Symbols of one trace, under the names they get in its graph: in the order they are met in."""

    def __init__(self, graph: Graph, tangents: Mapping[str, str | None]) -> None:
        """Puts names and bounds in place of torch's symbols in all values, and marks each call that meets one.
        tangents: placeholder -> the result whose gradient it is, in which tracing saw other symbols."""
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        nodes = {node.name: node for node in graph.nodes}
        for name, result in tangents.items():
            nodes[name].meta["val"] = nodes[result or name].meta["val"]
        symbolic = {node for node in graph.nodes if node.target is ASSERT or _symbolic(node.meta.get("val"))}
        for node in graph.nodes:
            if node in symbolic or any(n in symbolic for n in node.all_input_nodes):
                node.meta["data"] = node.op != "output"
            if node.target is ASSERT and isinstance(node.args[0], Node):
                node.args = (node.args[0], f"{WRONG}: {_said(node.args[0])}")
            if node in symbolic:
                node.meta["val"] = self._value(node.meta.get("val"))

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = tuple(map(self._size, value.shape))
            with value.fake_mode, torch.no_grad():  # pyright: ignore[reportAttributeAccessIssue]
                made = torch.empty([int(n) for n in shape], dtype=value.dtype, device=value.device)
            return name_shape(made, shape)
        if isinstance(value, SYMBOLIC):
            return Number(KINDS[type(value)], str(self._named(value.node.expr)))
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._value, value))
        return Number("check", "") if value is None else value

    def _size(self, n: Any) -> int:
        if not isinstance(n, SymInt) or not free_unbacked_symbols(n):
            return int(n)
        upper = n.node.shape_env.bound_sympy(n.node.expr).upper
        bound = int(upper) if upper.is_Integer and upper < NO_BOUND else None
        return DataSize(str(self._named(n.node.expr)), bound)

    def _named(self, expr: Any) -> Any:
        for symbol in sorted(expr.free_symbols - self._names.keys(), key=str):
            self._names[symbol] = sympy.Symbol(f"u{len(self._names)}")
        return expr.xreplace(self._names)


def _said(holds: Node) -> str:
    """What a check is of; a size that it makes a number is no symbol any more."""
    text = holds.meta["val"].text
    return text if text != "True" else f"{getattr(holds.target, '__name__', '')}({', '.join(map(str, holds.args))})"


def _symbolic(value: Any) -> bool:
    """Whether data decides a size of a value, or the value is a number."""
    if isinstance(value, Tensor):
        return any(isinstance(n, SymInt) for n in value.shape)  # also one that a check says is ten
    if isinstance(value, (list, tuple)):
        return any(map(_symbolic, value))
    return isinstance(value, SYMBOLIC)
