"""An index that counts through a whole dim does not select, it names the dim.

    %arange = aten.arange(8)
    %index: f32[8, 32] = aten.index.Tensor(%x, [%arange, %last])         x[arange(8), last], x of [8, 16, 32]
  ==>
    %view: i64[8, 1, 1] = aten.view(%last, [8, 1, 1])
    %expand: i64[8, 1, 32] = aten.expand(%view, [8, 1, 32])
    %gather: f32[8, 1, 32] = aten.gather(%x, 1, %expand)                 each row looks into its own
    %view_1: f32[8, 32] = aten.view(%gather, [8, 32])

so that rows stay where they are, where an index might have pointed to any. An index by nothing but such is a copy in
another shape: `mask[arange(8)[:, None, None], arange(16)]` is `mask[:, None, :]`. What backward adds up by such an
index is a scatter, or a plain sum. Left alone: dims that are not named in their order, more than one index that
selects, and sizes that data decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import arguments, shape, val
from shardc.compiler.ir.rewrite import emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import RESHAPES
from shardc.compiler.spec.sizes import of_data

aten = torch.ops.aten
WIDE = (torch.int64, torch.int32)  # that count through any dim
READS = (aten.index.Tensor, aten._unsafe_index.Tensor)
WRITES = (aten.index_put.default, aten._unsafe_index_put.default)
VIEWS = (*RESHAPES, aten.unsqueeze.default, aten.expand.default)


@dataclass(frozen=True)
class Named:
    """What indices [i0, i1, ...] into a tensor's first dims are: some name a dim each, one may select.

    common: the shape that all are broadcast to. dims: which dim of it each of the named ones counts through.
    """

    common: tuple[int, ...]
    dims: tuple[int, ...]
    selects: Node | None


@dataclass(frozen=True)
class NameDims:
    name = "name-dims"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        for node in call_nodes(gm, *READS, *WRITES):
            x, indices, *rest = arguments(node)
            adds = node.target in READS or rest[1:] == [True]
            if adds and (found := _named(x, indices)) is not None:
                with node.graph.inserting_before(node):
                    made = _read(node, x, found) if node.target in READS else _added(node, x, found, rest[0])
                replace(node, made)
                changes["read" if node.target in READS else "added"] += 1
        return PassResult(changes)


def _named(x: Node, indices: Sequence[Any]) -> Named | None:
    if any(not isinstance(i, Node) or val(i).dtype in (torch.bool, torch.uint8) for i in indices):
        return None
    if any(of_data(shape(node)) for node in (x, *indices)):
        return None
    common = tuple(torch.broadcast_shapes(*(shape(i) for i in indices)))
    counted = [_counts(i, n, len(common)) for i, n in zip(indices, shape(x), strict=False)]
    selects = [i for i, d in zip(indices, counted, strict=True) if d is None]
    dims = [d for d in counted if d is not None]
    in_order = dims == sorted(set(dims)) and counted[len(dims) :] == [None] * len(selects)
    others = [d for d, n in enumerate(common) if d not in dims and n > 1]
    if not dims or not in_order or len(selects) > 1:
        return None
    if others and (not selects or len(others) > 1 or others[0] < dims[-1]):
        return None
    return Named(common, tuple(dims), selects[0] if selects else None)


def _counts(index: Node, size: int, rank: int) -> int | None:
    """The dim, of so many, along which an index is 0, 1, ... up to a size; it is the same along all others."""
    start, made = index, shape(index)
    while index.op == "call_function" and (index.target in VIEWS or _changes_nothing(index)):
        index = arguments(index)[0]
        if sum(n > 1 for n in shape(index)) != 1:
            return None
    if index.target not in (aten.arange.default, aten.arange.start, aten.arange.start_step) or size == 1:
        return None
    if val(index).dtype not in WIDE:  # what is narrower wraps or rounds
        return None
    given = arguments(index)
    first, end, step = (0, *given, 1)[:3] if len(given) == 1 else (*given, 1)[:3]
    if (first, end, step) != (0, size, 1):
        return None
    along = [d for d, n in enumerate(made) if n == size and _varies(start, d)]
    return rank - len(made) + along[0] if len(along) == 1 else None


def _changes_nothing(node: Node) -> bool:
    """A cast to wide integers, or a sum with 0."""
    if node.target is aten._to_copy.default:
        return val(node).dtype in WIDE
    return node.target is aten.add.Tensor and arguments(node)[1:] == (0,) and not node.kwargs


def _varies(node: Node, dim: int) -> bool:
    """Whether a reshaped arange counts along this dim, and is not expanded along it."""
    while node.target in VIEWS or _changes_nothing(node):
        source = arguments(node)[0]
        if node.target is aten.expand.default:
            dim -= len(shape(node)) - len(shape(source))
            if dim < 0 or shape(source)[dim] == 1:
                return False
        elif node.target in VIEWS:
            (dim,) = (d for d, n in enumerate(shape(source)) if n > 1)
        node = source
    return True


def _read(node: Node, x: Node, found: Named) -> Node:
    whole = list(shape(node))
    if found.selects is None:
        copy = emit(aten.clone.default, (x,), node, {"memory_format": torch.contiguous_format})
        return emit(aten.view.default, (copy, whole), node)
    at = _places(node, x, found)
    gathered = emit(aten.gather.default, (x, len(found.dims), at), node)
    return emit(aten.reshape.default, (gathered, whole), node)


def _added(node: Node, x: Node, found: Named, values: Node) -> Node:
    """As index_put with accumulate=True."""
    rest = shape(x)[len(found.dims) + (found.selects is not None) :]
    full = emit(aten.expand.default, (values, [*found.common, *rest]), node)
    if found.selects is None:
        there = emit(aten.reshape.default, (full, list(shape(x))), node)
        return emit(aten.add.Tensor, (x, there), node)
    at = _places(node, x, found)
    there = emit(aten.reshape.default, (full, list(shape(at))), node)
    return emit(aten.scatter_add.default, (x, len(found.dims), at, there), node)


def _places(node: Node, x: Node, found: Named) -> Node:
    """Where each row looks, for every element: [named dims, how many places, the dims behind]."""
    assert found.selects is not None
    k = len(found.dims)
    rows, size, rest = [*shape(x)[:k]], shape(x)[k], [*shape(x)[k + 1 :]]
    count = [n for d, n in enumerate(found.common) if d not in found.dims and n > 1] or [1]
    at = found.selects
    if val(at).dtype != torch.int64:
        at = emit(aten._to_copy.default, (at,), node, {"dtype": torch.int64})
    at = emit(aten.expand.default, (at, list(found.common)), node)
    low = emit(aten.lt.Scalar, (at, 0), node)  # an index may count from the end, a place to gather from may not
    at = emit(aten.where.self, (low, emit(aten.add.Tensor, (at, size), node), at), node)
    at = emit(aten.reshape.default, (at, [*rows, *count, *[1] * len(rest)]), node)
    return emit(aten.expand.default, (at, [*rows, *count, *rest]), node)
