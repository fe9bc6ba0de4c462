"""Splits of parameters written as an entry of a plan, the way a user would: as styles, and else as placements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from shardc.compiler.driver.search.groups import Group
from shardc.compiler.driver.search.repeats import Repeats
from shardc.compiler.errors import PlanError
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.marks import MARK, parse_key
from shardc.compiler.ir.node import arguments, shape
from shardc.compiler.ir.signature import Traced
from shardc.compiler.plan.match import Names, join
from shardc.compiler.plan.splits import split_module
from shardc.compiler.plan.wishes import Style, Wish

SEQUENCE = 1  # the dim of activations [rows, length, width]
Dims = Mapping[str, int]


@dataclass(frozen=True)
class Cut:
    """How one kind of module may be split: its parameters by pattern, with their dims, for columns and for rows."""

    module: str
    columns: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, int], ...]


class Spelling:
    """Of one model. traced: with a mark at the border of each module that owns parameters."""

    def __init__(self, model: nn.Module, repeats: Repeats, traced: Traced) -> None:
        names = Names(model)
        owners = [f for f in names.modules if names.first(f) == f and names.owned(f)]
        self._marked = _marks(traced, repeats)
        self._owners: dict[str, list[str]] = {}  # pattern of each module -> those of its parameters
        self._cuts: list[Cut] = []
        for fqn in owners:
            pattern = repeats.pattern(fqn)
            if pattern not in self._owners:
                self._owners[pattern] = [repeats.pattern(join(fqn, own)) for own in names.owned(fqn)]
                self._cuts += _cut(names, fqn, repeats) if pattern in self._marked else []
        self._long = {module for module, shapes in self._marked.items() if any(map(_is_long, shapes))}

    def entry(self, groups: Iterable[Group], sequence: bool = False, taken: Collection[str] = ()) -> dict[str, object]:
        """What a mesh dim does that splits these. sequence: what it does not split, it computes on its part of the
        sequence. taken: parameters that are spoken of already."""
        left = dict(pair for group in groups for pair in group.dims)
        out: dict[str, object] = {}
        for cut in self._cuts:
            for dims, style in ((cut.columns, ColwiseParallel), (cut.rows, RowwiseParallel)):
                if dims and all(left.get(name) == dim for name, dim in dims) and not self._more(cut, dims, left):
                    along = sequence and style is RowwiseParallel and cut.module in self._long
                    out[cut.module] = style(output_layouts=Shard(SEQUENCE)) if along else style()
                    left = {name: dim for name, dim in left.items() if (name, dim) not in dims}
        out |= {name: Shard(dim) for name, dim in left.items()}
        if sequence:
            split = {name for group in groups for name, _ in group.dims} | {*taken}
            whole = [m for m, own in self._owners.items() if m in self._long and not split & set(own)]
            out = {m: SequenceParallel() for m in whole if m not in out} | out
        return out

    def _more(self, cut: Cut, dims: Iterable[tuple[str, int]], left: Dims) -> bool:
        """Whether more of a module is split than a style says, such as the bias of one that is split by rows."""
        return any(name in left and (name, left[name]) not in dims for name in self._owners[cut.module])


def _cut(names: Names, fqn: str, repeats: Repeats) -> list[Cut]:
    found = []
    for split in ("columns", "rows"):
        wish = Wish("", (fqn,), Style(split), "")
        try:
            dims = split_module(names, fqn, wish).dims
        except PlanError:
            dims = {}
        held = {name: dim for name, dim in dims.items() if join(fqn, name) in names.parameters and dim is not None}
        found.append(tuple((repeats.pattern(join(fqn, name)), dim) for name, dim in held.items()))
    return [Cut(repeats.pattern(fqn), *found)] if any(found) else []


def _marks(traced: Traced, repeats: Repeats) -> dict[str, list[tuple[int, ...]]]:
    """By pattern the modules whose border is marked, and the shapes of what they give."""
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for mark in call_nodes(traced.gm, MARK):
        key = parse_key(arguments(mark)[1])
        if key.kind in ("in", "out") and not key.grad:
            found[repeats.pattern(key.fqn)] += [tuple(shape(mark))] if key.kind == "out" else []
    return found


def _is_long(size: tuple[int, ...]) -> bool:
    return len(size) == 3 and size[SEQUENCE] > 1
