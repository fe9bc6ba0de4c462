"""What of a model's parameters may be split together: those dims that the graph says are one.

    heads        wq [out], wk [out], wv [out], wo [in]
    hidden       w1 [out], w3 [out], w2 [in]
    vocabulary   embedding [rows]

A dim of a parameter is made of the graph's factors, and a split falls on the outermost of which nothing behind it
needs other pieces. Parameters whose splits fall on the same factor are split together, or something moves between
them. Layers that are alike have one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from shardc.compiler.infer.atoms import WHOLE, Atom, Atoms
from shardc.compiler.ir.graph import inputs_of
from shardc.compiler.ir.node import nbytes, shape
from shardc.compiler.ir.signature import InputKind, Traced


@dataclass(frozen=True)
class Group:
    """Dims by the pattern of their parameter. size: of the factor. nbytes: of the parameters."""

    dims: tuple[tuple[str, int], ...]
    size: int
    nbytes: int

    def fits(self, taken: set[str]) -> bool:
        """Whether a mesh dim that splits those parameters may split these too."""
        return not taken & {name for name, _ in self.dims}


def groups(traced: Traced, atoms: Atoms, pattern: Callable[[str], str]) -> list[Group]:
    """Those of a canonical graph, of which these are the atoms, the largest first."""
    met: dict[Atom, dict[tuple[str, int], int]] = defaultdict(dict)
    for entry, node in inputs_of(traced.gm, traced.signature, InputKind.PARAMETER):
        for dim in range(len(shape(node))):
            leaves = atoms.of(node, dim)
            chosen = min(leaves, key=lambda leaf: leaf.needs, default=None)
            if chosen is not None and chosen.needs != WHOLE:
                met[chosen.root()][pattern(entry.name), dim] = nbytes(node)
    found: dict[tuple[tuple[str, int], ...], Group] = {}
    for atom, dims in met.items():
        names = [name for name, _ in dims]
        if len(set(names)) == len(names):  # a square weight may have both dims on one factor: it is split by one only
            key = tuple(dims)
            found.setdefault(key, Group(key, atom.size, sum(dims.values())))
    return sorted(found.values(), key=lambda group: -group.nbytes)
