"""What ranks repeat: the operations of all ranks beside those of one device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch.fx import GraphModule

from shardc.compiler.infer.decisions import call_rule
from shardc.compiler.infer.infer import decided
from shardc.compiler.ir.flops import global_flops
from shardc.compiler.ir.graph import call_nodes
from shardc.compiler.ir.node import of, operands, spec, specs, target_name
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import axes_of


class Repeated(NamedTuple):
    """One operator. flops: of one device. repeated: what all ranks together do beyond that. share: that, of all that
    ranks do in a step. fqn, where: the module and the user's line."""

    flops: int
    repeated: int
    share: float
    fqn: str
    where: str
    op: str
    name: str
    phase: str


class Work(tuple[Repeated, ...]):
    """Every operator that has operations to count, in order: matrix products, convolutions, attention."""

    @property
    def repeated(self) -> float:
        """Operations of all ranks over those of one device: 1.0 where nothing is done twice."""
        once = sum(entry.flops for entry in self)
        return 1.0 + sum(entry.repeated for entry in self) / once if once else 1.0

    @property
    def worst(self) -> list[Repeated]:
        """What repeats most, the largest first."""
        return sorted((entry for entry in self if entry.repeated), key=lambda entry: -entry.repeated)


def work(gm: GraphModule, mesh: Mesh) -> Work:
    """gm: at global shapes, every operand in the layout that its call needs."""
    found = list(_calls(gm, mesh))
    done = sum(ways * entry.flops for ways, entry in found)
    return Work(
        entry._replace(repeated=extra, share=extra / done)
        for ways, entry in found
        for extra in [(ways - 1) * entry.flops]
    )


def _calls(gm: GraphModule, mesh: Mesh) -> Iterator[tuple[int, Repeated]]:
    for node in call_nodes(gm):
        if flops := global_flops(node):
            rule = call_rule(node)
            taken = [spec(n) for n in operands(node)]
            factors = decided(rule, taken, specs(node), mesh).factors if rule is not None else ()
            split = {mesh.dim_of(axis) for _, dim in factors for axis in axes_of(dim)}
            view = of(node)
            entry = Repeated(flops, 0, 0.0, view.path, view.where, target_name(node.target), node.name, view.phase)
            yield math.prod(mesh[axis] for axis in mesh if axis not in split), entry


def by_place(entries: Iterable[Repeated]) -> list[tuple[str, str, float]]:
    """(module, line, share) of what repeats, the largest first."""
    shares: dict[tuple[str, str], float] = {}
    for entry in entries:
        if entry.repeated:
            place = entry.fqn or "the root", entry.where
            shares[place] = shares.get(place, 0.0) + entry.share
    return sorted(((fqn, where, share) for (fqn, where), share in shares.items()), key=lambda row: -row[2])
