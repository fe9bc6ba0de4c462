"""How passes edit a graph: new calls that inherit what they should, calls that take another one's place."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from shardc.compiler.ir.node import INHERITED, tensors
from shardc.compiler.spec.sizes import name_shape, named_shape
from shardc.compiler.spec.spec import Spec

CAST = torch.ops.aten._to_copy.default


def insert(graph: Graph, target: Any, args: tuple, like: Node, result: Spec | None = None, **meta: Any) -> Node:
    """A new node at the graph's insert point, with `like`'s value and source; the caller names its layout."""
    node = graph.call_function(target, args)
    node.meta = {k: like.meta[k] for k in ("val", *INHERITED) if k in like.meta} | meta
    if result is not None:
        node.meta["spec"] = result
    return node


def cast(value: Node, dtype: torch.dtype) -> Node:
    """The value in another dtype, at the graph's insert point; what it was cast from, if that has this one."""
    have = tensors(value)[0]
    if have.dtype is dtype:
        return value
    if value.target is CAST and _holds(have.dtype, dtype):
        source = value.all_input_nodes[0]
        if tensors(source)[0].dtype is dtype:
            return source
    node = value.graph.call_function(CAST, (value,), {"dtype": dtype})
    kept = ("spec", "origin", "why", *INHERITED)
    node.meta = {k: value.meta[k] for k in kept if k in value.meta} | {"wire": have.dtype}
    node.meta["val"] = name_shape(have.to(dtype), named_shape(have))
    return node


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the one is a number of the other."""
    return torch.promote_types(wide, narrow) is wide
