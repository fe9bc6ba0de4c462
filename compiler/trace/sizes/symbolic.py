"""Tracing with symbolic sizes: one trace for all sizes of the arguments' tensors that take the same path.

    traced = trace(module, (x,), symbolic=True)
    template = Template.of(traced.gm, traced.signature)
    template.solve([(8, 16)])      {s0: 8}, or None where a branch that forward took would go another way
    template.at({s0: 6}).gm        the same graph for six rows

Every size of every tensor argument starts as a symbol. torch turns those that the model's own sizes fix into
numbers, and records a condition for every Python branch that looks at the others. Sizes of 0 and 1 are numbers
from the start: they mean other things to broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.signature import InputKind, Signature, TensorInfo
from shardc.compiler.trace.torch_internals import FakeTensorMode, size_symbol

SYMBOLIC = (SymInt, SymFloat, SymBool)
Values = Mapping[sympy.Symbol, int]


def symbolic_stand_in(info: TensorInfo, mode: FakeTensorMode, device: torch.device, name: str) -> Tensor:
    """A fake tensor like `info`, dense, each of its sizes a symbol of the mode's own."""
    env = mode.shape_env
    assert env is not None
    sizes = [size_symbol(env, n, f"{name}_{dim}") for dim, n in enumerate(info.shape)]
    strides: list[Any] = [0] * len(sizes)
    step: Any = 1
    for dim in sorted(range(len(sizes)), key=lambda d: (info.stride[d], info.shape[d], -d)):
        strides[dim] = step
        step = step * sizes[dim]
    if info.device.type != "meta":
        device = info.device
    with mode, torch.inference_mode(False), torch.no_grad():
        fake = torch.empty_strided(sizes, strides, dtype=info.dtype, device=device)
    return fake.requires_grad_(info.requires_grad)


def symbolic_mode() -> FakeTensorMode:
    """Sizes that happen to be equal stay different symbols."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(duck_shape=False))


@dataclass(frozen=True)
class Sized:
    """A number in a template's graph: what it is in terms of the symbols."""

    expr: sympy.Expr
    kind: type = int

    @classmethod
    def of(cls, value: Any) -> Sized:
        kind = {SymInt: int, SymFloat: float, SymBool: bool}[type(value)]
        return cls(value.node.expr, kind)

    def __repr__(self) -> str:
        return f"Sized({str(self.expr)!r})"  # torch.fx writes it into a graph's code, which must parse

    def at(self, values: Values) -> Any:
        return self.kind(self.expr.xreplace({s: sympy.Integer(n) for s, n in values.items()}))


def depends_on_data(values: Iterator[Any], known: set[sympy.Symbol]) -> bool:
    """Whether any of these sizes or numbers is made from something else than the arguments' sizes."""
    return any(not v.node.expr.free_symbols <= known for v in values if isinstance(v, SYMBOLIC))


def symbols_of(tensors: Sequence[Tensor]) -> set[sympy.Symbol]:
    """The symbols in the sizes of the arguments."""
    sizes = [n for t in tensors for n in t.shape if isinstance(n, SymInt)]
    return {s for n in sizes for s in n.node.expr.free_symbols}


@dataclass(frozen=True)
class Template:
    """A traced module whose graph holds `Sized` for numbers, and symbolic sizes in its nodes' values."""

    gm: GraphModule
    signature: Signature
    symbols: tuple[sympy.Symbol, ...]  # in order of the arguments they are first met in
    sizes: tuple[tuple[Sized | int, ...], ...]  # per tensor argument
    conditions: tuple[Any, ...]  # sympy relations

    @classmethod
    def of(cls, gm: GraphModule, signature: Signature) -> Template:
        nodes = {n.name: n for n in gm.graph.nodes}
        batch = [nodes[signature.inputs[i].node].meta["val"] for i in signature.indices(InputKind.BATCH)]
        sizes = tuple(tuple(_sized(n) for n in t.shape) for t in batch)
        bare = [n.expr for shape in sizes for n in shape if isinstance(n, Sized)]
        symbols = tuple(dict.fromkeys(e for e in bare if isinstance(e, sympy.Symbol)))
        return cls(gm, signature, symbols, sizes, tuple(_conditions(batch)))

    def solve(self, shapes: Sequence[Sequence[int]]) -> dict[sympy.Symbol, int] | None:
        """The symbols' values for arguments of these shapes; None where this graph does not serve them."""
        values: dict[sympy.Symbol, int] = {}
        for have, want in zip(shapes, self.sizes, strict=True):
            for n, size in zip(have, want, strict=True):
                if isinstance(size, Sized) and isinstance(size.expr, sympy.Symbol):
                    values.setdefault(size.expr, int(n))
        fits = all(
            n == (size.at(values) if isinstance(size, Sized) else size)
            for have, want in zip(shapes, self.sizes, strict=True)
            for n, size in zip(have, want, strict=True)
        )
        return values if fits and self.admits(values) else None

    def admits(self, values: Values) -> bool:
        """Whether forward takes the traced path at these sizes."""
        known = {s: sympy.Integer(n) for s, n in values.items()}
        return min(values.values(), default=2) >= 2 and all(c.xreplace(known) is sympy.true for c in self.conditions)

    def at(self, values: Values) -> Any:
        """The graph with numbers for symbols, as tracing at these sizes would have given it."""
        from shardc.compiler.ir.signature import Traced

        copy, mode = copy_graph(self.gm), FakeTensorMode(allow_non_fake_inputs=True)
        for node in copy.graph.nodes:
            node.args, node.kwargs = _placed(node.args, values, mode), _placed(node.kwargs, values, mode)
            if "val" in node.meta:
                node.meta["val"] = _placed(node.meta["val"], values, mode)
        return Traced(copy, self.signature)

    @cached_property
    def numbers(self) -> dict[str, list[Sized]]:
        """By node, the numbers and sizes in it that depend on the symbols, each once."""
        return {node.name: _sized_in(node) for node in self.gm.graph.nodes}

    @cached_property
    def expressions(self) -> list[Sized]:
        return list(dict.fromkeys(sized for found in self.numbers.values() for sized in found))


def _sized_in(node: Node) -> list[Sized]:
    found: dict[Sized, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, Sized):
            found[value] = None
        elif isinstance(value, Tensor):
            for n in (*value.shape, *value.stride()):
                look(n)
        elif isinstance(value, SYMBOLIC):
            look(Sized.of(value))
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)

    look((*node.args, *node.kwargs.values(), node.meta.get("val")))
    return [sized for sized in found if sized.expr.free_symbols]


def _conditions(batch: Sequence[Tensor]) -> Iterator[Any]:
    """What torch has recorded of the sizes: the outcome of each branch."""
    envs = {id(n.node.shape_env): n.node.shape_env for t in batch for n in t.shape if isinstance(n, SymInt)}
    for env in envs.values():
        for guard in env.guards:
            condition = env.simplify(guard.expr)
            if condition is not sympy.true:
                yield condition


def _sized(n: Any) -> Sized | int:
    if not isinstance(n, SymInt):
        return int(n)
    sized = Sized.of(n)
    return sized if sized.expr.free_symbols else int(sized.expr)


def _placed(value: Any, values: Values, mode: FakeTensorMode) -> Any:
    if isinstance(value, Sized):
        return value.at(values)
    if isinstance(value, SYMBOLIC):
        return Sized.of(value).at(values)
    if isinstance(value, Tensor):
        shape, stride = ([_placed(n, values, mode) for n in held] for held in (value.shape, value.stride()))
        with mode, torch.no_grad():
            fake = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return fake.requires_grad_(value.requires_grad)
    if isinstance(value, slice):
        return slice(*(_placed(n, values, mode) for n in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)):
        items = [_placed(item, values, mode) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: _placed(v, values, mode) for k, v in value.items()}
    return value
