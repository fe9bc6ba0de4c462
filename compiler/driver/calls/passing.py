"""How what the ranks pass lies: parts of one batch, or the same on each. Global shapes follow from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardc.compiler.driver.calls.call_keys import global_shape
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.infer.batch import Batch, NotRows
from shardc.compiler.infer.marked_layouts import input_layouts, told
from shardc.compiler.ir.graph import inputs_of
from shardc.compiler.ir.marks import border_key
from shardc.compiler.ir.node import shape
from shardc.compiler.ir.signature import InputKind, Traced
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.trace.trace import argument_names

Made = TypeVar("Made")
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Taken:
    """How what ranks pass was taken. whole: names of inputs that are no rows; layouts: of the leaves of a call."""

    whole: Collection[str]
    layouts: Sequence[Mapping[str, Any]]
    plan: Resolved

    def noted(self, traced: Traced) -> Traced:
        """The traced call, saying so of its inputs."""
        pairs = inputs_of(traced.gm, traced.signature, InputKind.BATCH)
        open_ = {e.node for e, n in pairs if shape(n) and told("in", e.name, n, self.plan) is None}
        inputs = traced.signature.inputs
        inputs = [replace(e, rows=e.name not in self.whole) if e.node in open_ else e for e in inputs]
        return Traced(traced.gm, replace(traced.signature, inputs=tuple(inputs)))


@dataclass(frozen=True)
class Passing:
    """trace: a call's graph, at the sizes that it has."""

    module: nn.Module
    plan: Resolved
    mesh: Mesh
    trace: Callable[[Call], Traced]

    def guesses(self, call: Call) -> Iterator[set[str]]:
        """Names of the inputs that are no rows of the batch, as sizes say, or else as the graph of one rank's sizes
        does. Another one is asked for where a graph of global sizes cannot be made, or shows otherwise.

        Raises PlanError where the graph does not tell either.
        """
        rows = {name: x.shape[0] for name, x in self._open(call)} if self.plan.batch_axes else {}
        counts = {*rows.values()}
        first = next(iter(rows.values()), 1)
        if len(counts) < 2:
            yield set()
        elif len(counts) == 2 and 1 in counts and first != 1:
            yield {name for name, n in rows.items() if n == 1}
        if len(rows) > 1:
            traced = self.trace(call)
            batch = Batch(traced.gm, traced.signature, self.plan)
            batch.check()
            yield batch.whole

    def taken(self, call: Call, whole: Collection[str]) -> Taken:
        """whole: names of inputs that are no rows."""
        if self.plan.declares_inside:  # only the graph shows it
            traced = Taken(whole, (), self.plan).noted(self.trace(call))
            found = input_layouts(traced.gm, traced.signature, self.plan)
            layouts = [{} if leaf.input is None else found[leaf.input] for leaf in traced.signature.leaves]
            return Taken(whole, layouts, self.plan)
        layouts = [
            self.plan.root_layout("in", name, x.dim(), _entering(head), None if name in whole else 0)
            if isinstance(x, Tensor)
            else {}
            for x, (name, head) in self._leaves(call)
        ]
        return Taken(whole, layouts, self.plan)

    def whole(self, call: Call, taken: Taken) -> Call:
        """The arguments with meta tensors of global shape in place of pieces."""
        leaves, structure = pytree.tree_flatten(call)
        pairs = zip(self._leaves(call), taken.layouts, strict=True)
        for i, ((x, (name, _)), layout) in enumerate(pairs):
            if not isinstance(x, Tensor):
                continue
            self._check_label(x, name, layout)
            shape = global_shape(x, layout, self.mesh)
            if shape != tuple(x.shape):
                leaves[i] = torch.empty(shape, dtype=x.dtype, device="meta").requires_grad_(x.requires_grad)
        return pytree.tree_unflatten(leaves, structure)

    def tried(self, call: Call, made: Callable[[Taken], Made]) -> Made:
        """What is made of the first guess that the graph of global sizes bears out."""
        refused: ShardingError | NotRows | None = None
        tried: list[set[str]] = []
        try:
            for whole in self.guesses(call):
                if whole in tried:
                    break
                tried.append(whole)
                try:
                    return made(self.taken(call, whole))
                except (ShardingError, NotRows) as error:
                    refused = refused or error
        except ShardingError as error:  # at one rank's sizes forward does not run either
            raise refused or error from (refused or error).__cause__
        assert refused is not None
        raise refused

    def _leaves(self, call: Call) -> list[tuple[Any, tuple[str, str]]]:
        """Of the arguments, with their readable paths and those at the root's border."""
        return list(zip(pytree.tree_leaves(call), argument_names(self.module, *call), strict=True))

    def _open(self, call: Call) -> list[tuple[str, Tensor]]:
        """The inputs of which nobody says how they lie over data-parallel mesh dims."""
        found = [(name, head, x) for x, (name, head) in self._leaves(call) if isinstance(x, Tensor) and x.dim()]
        found = [(name, head, x) for name, head, x in found if not isinstance(x, DTensor)]  # which says it itself
        return [(name, x) for name, head, x in found if self.plan.told("in", name, x.dim(), _entering(head)) is None]

    def _check_label(self, x: Tensor, name: str, layout: Mapping[str, Any]) -> None:
        """A DTensor says itself how it lies; that must be what the program was told."""
        if not isinstance(x, DTensor):
            return
        told = tuple(layout.get(axis, Replicate()) for axis in self.mesh.names)
        if Mesh.of(x.device_mesh) != self.mesh or tuple(x.placements) != told:
            raise PlanError(
                f"input {name} is a DTensor laid out {tuple(x.placements)}, and the program expects {told}",
                help=f"say so: compile(..., inputs={{{name!r}: Layout(...)}}), or redistribute it before the call",
            )


def _entering(head: str) -> list[str]:
    return [border_key("", "in", head)]
