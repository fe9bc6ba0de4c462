"""The factors that the dims of a whole graph are made of, found by unifying what every rule says is equal.

    %w: f32[144, 48]        rows feed a product, the product is cut in three, a third is viewed as 3 heads of 16
    atoms of %w's dim 0:    3 (fetched: the thirds are taken apart), 3, 16

An open split of those 144 rows then goes to the heads, the outermost atom of which nothing needs other pieces.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch.fx import Node

from shardc.compiler.infer.decisions import Decisions, call_rule
from shardc.compiler.ir.collectives import reshard
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import operands, result_number, tensors

FREE, FETCHED, WHOLE = range(3)


class Atom:
    """A set of equal dims (or parts of dims): a size, or a product of further atoms once some view splits it.

    needs: FREE where every rank goes on with its own piece, FETCHED where some operator asks others for theirs,
    WHOLE where one takes it whole only.
    """

    __slots__ = ("_parent", "needs", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size, self.needs = size, FREE
        self.parts: list[Atom] = []
        self._parent: Atom | None = None

    def root(self) -> Atom:
        atom = self
        while atom._parent is not None:
            atom = atom._parent
        return atom

    def leaves(self) -> list[Atom]:
        root = self.root()
        return [leaf for part in root.parts for leaf in part.leaves()] if root.parts else [root]

    def split(self, size: int) -> None:
        """This leaf becomes (size, rest)."""
        self.parts = [Atom(size), Atom(self.size // size)]
        for part in self.parts:
            part.needs = self.needs

    def join(self, other: Atom) -> None:
        """These two leaves are one."""
        if self is not other:
            other._parent = self
            self.needs = max(self.needs, other.needs)


def unify(left: Sequence[Atom], right: Sequence[Atom]) -> bool:
    """State that two runs of atoms are the same dim; False where no common factors exist (nothing is undone)."""
    a = [leaf for atom in left for leaf in atom.leaves() if leaf.size != 1]
    b = [leaf for atom in right for leaf in atom.leaves() if leaf.size != 1]
    while a and b:
        x, y = a.pop(0).root(), b.pop(0).root()
        if x.parts or y.parts:  # split meanwhile, as part of another run
            a, b = [*x.leaves(), *a], [*y.leaves(), *b]
            continue
        if x.size == y.size:
            x.join(y)
            continue
        large, small = (x, y) if x.size > y.size else (y, x)
        if small.size == 0 or large.size % small.size:
            return False
        large.split(small.size)
        a, b = [*x.leaves(), *a], [*y.leaves(), *b]
    return not a and not b


class Atoms:
    """The atoms of every dim of every value in a graph."""

    def __init__(self, nodes: Iterable[Node], known: Decisions | None = None) -> None:
        """nodes: of a graph, in its order, with all that they are made of."""
        self._known = known
        self._dims: dict[Node, list[list[list[Atom]]]] = {}
        for node in nodes:
            if node.op in ("placeholder", "call_function"):
                self._dims[node] = self._results(node)

    def of(self, node: Node, dim: int, result: int = 0) -> list[Atom]:
        """The leaves of one dim of a node's result, outermost first; leaves of size 1 left out."""
        return [leaf for atom in self._dims[node][result][dim] for leaf in atom.leaves() if leaf.size != 1]

    def _results(self, node: Node) -> list[list[list[Atom]]]:
        fresh = [[[Atom(int(n))] for n in t.shape] for t in tensors(node)]
        if node.target in (MARK, reshard):
            return self._dims[node.args[0]]  # pyright: ignore[reportArgumentType]
        if node.target is operator.getitem:
            source, index = node.args
            return [self._dims[source][result_number(source, index)]]  # pyright: ignore[reportArgumentType]
        rule = call_rule(node, self._known) if node.op == "call_function" else None
        if rule is None:
            for operand in operands(node) if node.op == "call_function" else ():
                for dim in self._dims[operand][0]:
                    _keep_whole(dim)
            return fresh
        factors = {name: Atom(size) for name, size in rule.sizes}
        for need, names in ((FETCHED, rule.joined & rule.plain), (WHOLE, rule.whole)):
            for name in names & factors.keys():
                factors[name].needs = need
        for names, operand in zip(rule.operands, operands(node), strict=True):
            for dim_names, dim in zip(names, self._dims[operand][0], strict=True):
                if dim_names:
                    unify(dim, [factors[n] for n in dim_names])
        return [[[factors[n] for n in dim_names] or [Atom(1)] for dim_names in names] for names in rule.results]


def _keep_whole(dim: list[Atom]) -> None:
    for atom in dim:
        for leaf in atom.leaves():
            leaf.needs = WHOLE
