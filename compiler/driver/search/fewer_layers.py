"""A traced model with fewer of its equal layers: each that is left out costs what one that stays does.

    layers.0  layers.1  layers.2 ... layers.30  layers.31      first, equal ones, last
    layers.0  layers.1                          layers.31      fewer: one of the equal ones, `more` of them

Forward goes on behind the last that stays, and backward comes back to it, as at the last that is left out. Models whose
layers are not alike, use each other otherwise than one after another, or share what they are made of, stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from shardc.compiler.ir.graph import copy_graph, output_node, placeholders
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import of, tensors
from shardc.compiler.ir.signature import Input, Leaf, Output, OutputKind, Signature, Traced

ENDS = 2  # the first layer and the last, which have other neighbours
Twins = Mapping[int, Sequence[Node]]


class _Differ(Exception):
    """The layers are not alike, or depend on each other in another way."""


@dataclass(frozen=True)
class Fewer:
    """short: a model with one equal layer in each stack that has several. longer: for each such stack the same with two
    there, and how many more it has. Without equal layers the model itself, and no stacks."""

    short: Traced
    longer: tuple[tuple[Traced, int], ...] = ()
    stacks: tuple[tuple[str, int], ...] = ()

    def whole(self, count: Callable[[Traced], float]) -> float:
        """What the whole model counts, of something that grows by as much with each equal layer."""
        first = count(self.short)
        return first + sum(more * (count(traced) - first) for traced, more in self.longer)

    def weight(self, node: Node) -> int:
        """For how many calls of the whole model a call in `short` stands."""
        path = of(node).path
        return next((equal for stack, equal in self.stacks if _number(path, stack) == 1), 1)


def fewer_layers(traced: Traced, stacks: Sequence[str]) -> Fewer:
    """stacks: FQNs of the containers whose children are numbered layers."""
    cut: dict[str, int] = {}
    short = traced
    for stack in stacks:
        count = _count(traced, stack)
        if count > ENDS + 2 and (found := _without(short, stack, 1)) is not None:
            short, cut[stack] = found, count
    longer = []
    for stack, count in cut.items():
        found: Traced | None = traced
        for other in cut:
            found = found and _without(found, other, 1 + (other == stack))
        if found is None:
            return Fewer(traced)
        longer.append((found, count - ENDS - 1))
    return Fewer(short, tuple(longer), tuple((stack, count - ENDS) for stack, count in cut.items()))


def _number(path: str, stack: str) -> int | None:
    """Which layer of a stack something lies in."""
    prefix = f"{stack}." if stack else ""
    head = path.removeprefix(prefix).split(".")[0]
    return int(head) if path.startswith(prefix) and head.isdigit() else None


def _count(traced: Traced, stack: str) -> int:
    found = [_number(of(n).path, stack) for n in traced.gm.graph.nodes if n.op != "output"]
    return max((n for n in found if n is not None), default=-1) + 1


def _without(traced: Traced, stack: str, stay: int) -> Traced | None:
    """A copy with so many of the equal layers; None where the layers are not alike."""
    gm = copy_graph(traced.gm)
    try:
        return _cut(Traced(gm, traced.signature), stack, stay)
    except _Differ:
        return None


def _cut(traced: Traced, stack: str, stay: int) -> Traced:
    graph, layers = traced.gm.graph, defaultdict(list)
    place = {n: _number(of(n).path, stack) for n in graph.nodes if n.op != "output"}
    for node, number in place.items():
        layers[number].append(node)
    last = max(n for n in layers if n is not None)
    twins = {i: layers[i] for i in range(1, last)}
    for i in twins:
        _check_alike(layers[1], layers[i], place)
    gone = {node for i in range(stay + 1, last) for node in layers[i]}
    end = output_node(traced.gm)
    for user in [n for n in graph.nodes if n not in gone and n is not end]:
        if any(used in gone for used in user.all_input_nodes):
            _mend(user, place, twins, stay, last, gone)
    kept = _signature(traced, gone)
    end.args = (tuple(e for e, output in zip(end.args[0], traced.signature.outputs, strict=True)  # pyright: ignore
                      if not _of_gone(output, traced.signature, kept)),)  # fmt: skip
    if any(used in gone for used in end.all_input_nodes):
        raise _Differ
    for node in [n for n in reversed(graph.nodes) if n in gone]:
        graph.erase_node(node)
    return Traced(traced.gm, _renumbered(traced.signature, kept))


def _check_alike(first: Sequence[Node], other: Sequence[Node], place: Mapping[Node, int | None]) -> None:
    """Raises _Differ unless two layers are the same calls of the same sizes, within and to what lies outside."""
    if len(first) != len(other):
        raise _Differ
    twin = dict(zip(first, other, strict=True))
    for a, b in twin.items():
        sizes = [[(tuple(t.shape), t.dtype) for t in tensors(n)] for n in (a, b)]
        if a.op != b.op or sizes[0] != sizes[1] or len(a.all_input_nodes) != len(b.all_input_nodes):
            raise _Differ
        if a.op == "placeholder":
            continue
        if a.target is not b.target or (a.target is not MARK and _static(a) != _static(b)):
            raise _Differ
        for x, y in zip(_used(a), _used(b), strict=True):
            inside = place[x] == place[a]
            if (inside and twin[x] is not y) or inside != (place[y] == place[b]):
                raise _Differ
            if place[x] is None and x is not y or (place[x] is None) != (place[y] is None):
                raise _Differ


def _static(node: Node) -> Any:
    return repr(map_arg((node.args, node.kwargs), lambda n: None))


def _used(node: Node) -> list[Node]:
    """Operands in order, one that is used twice, twice."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _mend(
    user: Node, place: Mapping[Node, int | None], twins: Twins, stay: int, last: int, gone: Collection[Node]
) -> None:
    """Behind the layers that are left out, take what the last one that stays gives; within it, what the last that is
    left out takes."""
    number = place[user]
    if number == stay:
        like = twins[last - 1][twins[stay].index(user)]
        instead = dict(zip(_used(user), _used(like), strict=True))
    elif number is None or number == last:
        before = dict(zip(twins[last - 1], twins[stay], strict=True))
        instead = {used: before.get(used, used) for used in _used(user)}
    else:
        raise _Differ
    for used in user.all_input_nodes:
        if used in gone:
            if instead[used] in gone:
                raise _Differ
            user.replace_input_with(used, instead[used])


def _signature(traced: Traced, gone: Collection[Node]) -> list[int]:
    """Which inputs stay."""
    return [i for i, node in enumerate(placeholders(traced.gm)) if node not in gone]


def _of_gone(output: Output, signature: Signature, kept: Sequence[int]) -> bool:
    return output.kind is not OutputKind.OUTPUT and output.of is not None and output.of not in set(kept)


def _renumbered(signature: Signature, kept: Sequence[int]) -> Signature:
    """The same ends, less those that are left out."""
    outputs = [i for i, o in enumerate(signature.outputs) if not _of_gone(o, signature, kept)]
    now_in, now_out = ({old: new for new, old in enumerate(stay)} for stay in (kept, outputs))

    def given(entry: Input) -> Input:
        return replace(entry, of=None if entry.of is None else now_out[entry.of])

    def made(entry: Output) -> Output:
        source = entry.of if entry.of is None else now_in[entry.of]
        return replace(entry, of=source, same=None if entry.same is None else now_out[entry.same])

    def leaf(entry: Leaf) -> Leaf:
        return replace(entry, input=None if entry.input is None else now_in[entry.input])

    return replace(
        signature,
        inputs=tuple(given(signature.inputs[i]) for i in kept),
        outputs=tuple(made(signature.outputs[i]) for i in outputs),
        leaves=tuple(map(leaf, signature.leaves)),
    )
