"""A traced module as plain data, for JSON: no code, no pickle. What cannot be written so is refused by name.

data = to_data(traced)      dicts, lists, strings, numbers
from_data(data)             a Traced of equal text and meaning
"""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.node import INHERITED
from shardc.compiler.ir.signature import Input, InputKind, Leaf, Output, OutputKind, Signature, Traced
from shardc.compiler.spec.sizes import DataSize, Number, name_shape, named_shape, of_data

OPERATORS = "add sub mul truediv floordiv mod pow neg and_ or_ not_ lt le gt ge eq ne"
NAMED = {  # values of torch that are written by name
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


# What is computed with numbers that data decides. By name: torch.fx knows these functions by their module.
NUMBER_CALLS: dict[Any, str] = {
    **{getattr(operator, name): f"operator.{name}" for name in OPERATORS.split()},
    **{getattr(torch, name): f"torch.{name}" for name in torch.__all__ if name.startswith("sym_")},
}


def to_data(traced: Traced) -> dict[str, Any]:
    """Raises ShardingError for an argument, a constant or an operator that has no form as data."""
    return {
        "nodes": [_node_data(node) for node in traced.gm.graph.nodes],
        "signature": _signature_data(traced.signature),
    }


def from_data(data: Mapping[str, Any]) -> Traced:
    """Raises ShardingError for an operator that is not registered here; ValueError for data of another form."""
    graph, read = Graph(), _Reader()
    for item in data["nodes"]:
        target = _target(item["target"]) if item["op"] == "call_function" else item["target"]
        args, kwargs = read(item["args"]), read(item["kwargs"])
        node = graph.create_node(item["op"], target, tuple(args), kwargs, item["name"])
        node.meta = {key: read(value) for key, value in item["meta"].items()}
        read.nodes[item["name"]] = node
    graph.lint()
    return Traced(GraphModule(torch.nn.Module(), graph), _signature(data["signature"], read))


def _node_data(node: Node) -> dict[str, Any]:
    meta = {key: node.meta[key] for key in ("val", *INHERITED) if node.meta.get(key) is not None}
    try:
        return {
            "op": node.op,
            "name": node.name,
            "target": _target_text(node),
            "args": [_data(arg) for arg in node.args],
            "kwargs": _data(dict(node.kwargs)),
            "meta": {key: _data(value) for key, value in meta.items()},
        }
    except _NoForm as error:
        raise ShardingError(
            f"%{node.name} cannot be saved: {error}",
            where=node.meta.get("where") or "",
            help="compile where the program runs, instead of loading it",
        ) from None


def _target_text(node: Node) -> str:
    if isinstance(node.target, OpOverload):
        return str(node.target)
    if node.target is operator.getitem:
        return "getitem"
    if node.target in NUMBER_CALLS:
        return NUMBER_CALLS[node.target]
    if node.op in ("placeholder", "output"):
        return str(node.target)
    raise _NoForm(f"its operator is {node.target}")


def _target(text: str) -> Any:
    if text == "getitem":
        return operator.getitem
    if text in NUMBER_CALLS.values():
        return next(call for call, name in NUMBER_CALLS.items() if name == text)
    space, name, overload = text.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, space), name), overload)
    except AttributeError:
        raise ShardingError(
            f"the saved program calls {text}, which is no operator here", help="import what registers it first"
        ) from None


class _NoForm(Exception):
    """A value that data cannot hold."""


def _data(value: Any) -> Any:
    """A value as JSON takes it: what JSON has no word for is a dict of one tag and its content."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, list):
        return [_data(item) for item in value]
    for tag, (kinds, write, _) in FORMS.items():
        if isinstance(value, kinds):
            return {tag: write(value)}
    raise _NoForm(f"it holds a {type(value).__name__}")


class _Reader:
    """The reverse of `_data`, with the nodes read so far by name, and fake tensors of one mode."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __call__(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((tag, content),) = data.items()
        return FORMS[tag][2](content, self)


def _tensor_data(x: Tensor) -> dict[str, Any]:
    held = _info_data(x) | ({"named": _data(named_shape(x))} if of_data(named_shape(x)) else {})
    if not isinstance(x, torch._subclasses.FakeTensor):
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        held["bytes"] = base64.b64encode(flat.numpy().tobytes()).decode()
    return held


def _info_data(x: Tensor) -> dict[str, Any]:
    if x.layout is not torch.strided or x.is_conj() or x.is_neg():
        raise _NoForm("it holds a tensor that is not dense")
    sizes = {"shape": list(map(int, x.shape)), "stride": list(map(int, x.stride()))}
    return {**sizes, "dtype": _name(x.dtype), "device": str(x.device), "requires_grad": x.requires_grad}


def _tensor(held: Mapping[str, Any], read: _Reader) -> Tensor:
    shape, stride, dtype = held["shape"], held["stride"], getattr(torch, held["dtype"])
    if "bytes" not in held:
        with read.mode:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=held["device"])
            x.requires_grad_(held["requires_grad"])
        return name_shape(x, tuple(read(held["named"]))) if "named" in held else x
    flat = torch.frombuffer(bytearray(base64.b64decode(held["bytes"])), dtype=dtype) if 0 not in shape else None
    x = torch.empty_strided(shape, stride, dtype=dtype, device=held["device"])
    if flat is not None:
        x = flat.reshape(shape).to(held["device"]) if 0 in stride else x.copy_(flat.reshape(shape))
    return x


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _pairs(value: Mapping[Any, Any]) -> list[Any]:
    return [[_data(k), _data(v)] for k, v in value.items()]


def _spec_text(spec: Any) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise _NoForm(str(error)) from None


# tag -> (types, to data, from data). Order matters: a Size is a tuple.
FORMS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "size": (DataSize, lambda x: x.__getnewargs__(), lambda x, read: DataSize(*x)),
    "number": (Number, lambda x: [x.kind, x.text], lambda x, read: Number(*x)),
    "node": (Node, lambda x: x.name, lambda x, read: read.nodes[x]),
    "tensor": (Tensor, _tensor_data, _tensor),
    "float": (float, repr, lambda x, read: float(x)),
    "complex": (complex, repr, lambda x, read: complex(x)),
    "tuple": (tuple, lambda x: [_data(i) for i in x], lambda x, read: tuple(read(x))),
    "dict": (Mapping, _pairs, lambda x, read: {read(k): read(v) for k, v in x}),
    "slice": (slice, lambda x: [_data(i) for i in (x.start, x.stop, x.step)], lambda x, read: slice(*read(x))),
    "ellipsis": (type(...), lambda x: 0, lambda x, read: ...),
    "device": (torch.device, str, lambda x, read: torch.device(x)),
    "bytes": (bytes, lambda x: base64.b64encode(x).decode(), lambda x, read: base64.b64decode(x)),
    "spec": (pytree.TreeSpec, _spec_text, lambda x, read: pytree.treespec_loads(x)),
    **{tag: (kind, _name, lambda x, read: getattr(torch, x)) for tag, kind in NAMED.items()},
}
KINDS = {"inputs": (Input, InputKind), "outputs": (Output, OutputKind)}


def _signature_data(signature: Signature) -> dict[str, Any]:
    def entry(item: Any) -> dict[str, Any]:
        held = {field.name: getattr(item, field.name) for field in fields(item)}
        return {key: value.value if key == "kind" else _data(value) for key, value in held.items()}

    held = {field.name: getattr(signature, field.name) for field in fields(signature) if field.compare}
    try:
        return {k: [entry(i) for i in v] if k in (*KINDS, "leaves") else _data(v) for k, v in held.items()}
    except _NoForm as error:
        raise ShardingError(
            f"the program's inputs or results cannot be saved: {error}",
            help="pass and return tensors, numbers and strings in lists, tuples and dicts",
        ) from None


def _signature(data: Mapping[str, Any], read: _Reader) -> Signature:
    held: dict[str, Any] = {k: read(v) for k, v in data.items() if k not in (*KINDS, "leaves")}
    for name, (make, kind) in KINDS.items():
        rows = [{k: kind(v) if k == "kind" else read(v) for k, v in item.items()} for item in data[name]]
        held[name] = tuple(make(**row) for row in rows)
    held["leaves"] = tuple(Leaf(**{k: read(v) for k, v in item.items()}) for item in data["leaves"])
    held["tied"] = MappingProxyType(held["tied"])
    return Signature(**held)
