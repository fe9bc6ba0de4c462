"""Random operators become numbered draws from one seed (rng="counter").

    %bernoulli: f32[8, 16] = aten.bernoulli.p(%x, 0.9)
  ==>
    %seed: i64[2] = shardc.seed(cpu)
    %draw: i64[8, 16] = shardc.draw(%x, %seed, 0, 53)
    %lt: b8[8, 16] = aten.lt.Scalar(%draw, 8106479329266893)
    %bernoulli: f32[8, 16] = aten._to_copy(%lt, dtype=f32)

The seed is drawn once per call of the program, from torch's default generator; an element's bits depend on it,
the draw's number and the element's place in the whole tensor, so on no layout. Recomputed in backward they are
the same. Left alone: what only torch knows how to draw (`torch.poisson`, say), which every rank draws whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import of, target_name, tensors, val
from shardc.compiler.ir.rewrite import compute, emit, replace
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.ops.random.distributions import DISTRIBUTIONS, SEED, Draw, like_of
from shardc.compiler.spec.sizes import name_shape, named_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class NumberDraws:
    name = "number-draws"
    takes = gives = Stage.TRACED
    exact = False  # other numbers than torch's

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        seeds: dict[torch.device, Node] = {}
        for node in call_nodes(gm):
            if node.target in DISTRIBUTIONS:
                _check(node)
                changes["numbered"] += _number(node, changes["numbered"], seeds)
        return PassResult(+changes)


def _number(node: Node, number: int, seeds: dict[torch.device, Node]) -> bool:
    """Whether the call could be replaced."""
    out = tensors(node)[0]

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        return emit(op, args, node, kwargs, value=name_shape(compute(op, args, kwargs), named_shape(out)))

    def seed() -> Node:
        if out.device not in seeds:
            seeds[out.device] = _seed(node, out)
        return seeds[out.device]

    with node.graph.inserting_before(node):
        like = like_of(node.all_input_nodes, named_shape(out), _shape)
        if like is None and of(node).data:
            raise _unseen(node)
        if like is None:
            like = _canvas(node, out)
        result = DISTRIBUTIONS[node.target](Draw(call, like, seed, number, out.dtype), *node.args, **node.kwargs)
    if result is None:
        return False
    replace(node, result)
    return True


def _shape(node: Node) -> tuple[int, ...] | None:
    return named_shape(val(node)) if isinstance(val(node), torch.Tensor) else None


def _unseen(node: Node) -> ShardingError:
    return ShardingError(
        f"{target_name(node.target)} draws as many numbers as data says, and like no tensor",
        where=of(node).where,
        help='draw them like a tensor that has this size (torch.rand_like), or compile with rng="replay"',
    )


def _seed(node: Node, out: torch.Tensor) -> Node:
    value = out.new_empty([2], dtype=torch.int64)
    return emit(SEED, (out.device,), node, value=value, region="")  # backward draws from what forward saved


def _canvas(node: Node, out: torch.Tensor) -> Node:
    """A tensor as large as the result, where no operand is: only its shape is looked at."""
    given, value = {"dtype": torch.bool, "device": out.device}, out.new_empty(out.shape, dtype=torch.bool)
    return emit(aten.empty.memory_format, (list(out.shape),), node, given, value=value)


def _check(node: Node) -> None:
    """Raises ShardingError for parameters that torch refuses, in torch's words."""
    first, *rest = [*node.args, None]
    if not isinstance(first, Node) or any(isinstance(x, Node) for x in rest):
        return
    sample = torch.zeros(1, dtype=val(first).dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            node.target(sample, *node.args[1:])  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        raise ShardingError(str(error).splitlines()[0], where=of(node).where) from error
