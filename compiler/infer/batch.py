"""What of a model's inputs and outputs is rows of the batch, as its graph shows where nobody says so.

    forward(x [8, 5, 6], mask [5, 5])      the rows of the mask are the columns of x, so they are no batch
    return h [8, 6], scale [6], h.T        scale is made of no input; the rows of x are the last dim of h.T

Inputs are rows along dim 0, unless that is equal to a dim of a parameter, or to another dim of an input that is itself
rows: those are the same on every rank. So is what has one row where others have more. Outputs are split along the dim
that the rows of an input have become.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from shardc.compiler.errors import PlanError
from shardc.compiler.infer.atoms import Atom, Atoms
from shardc.compiler.infer.decisions import Decisions, call_rule
from shardc.compiler.infer.marked_layouts import input_layout, told
from shardc.compiler.ir.graph import forward_of, inputs_of
from shardc.compiler.ir.node import operands, shape, tensors
from shardc.compiler.ir.signature import InputKind, Signature
from shardc.compiler.plan.resolved import Resolved


class NotRows(PlanError):
    """Inputs whose sizes were taken for parts of a batch, and are none."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{', '.join(names)}: no rows of the batch", help="say so: compile(..., inputs=...)")
        self.names = tuple(names)


class _Open(NamedTuple):
    """An input of which nobody says whether it is rows."""

    name: str
    node: Node
    lead: Atom | None  # what its rows are; None of one row
    beside: set[Atom]  # its other dims


class Batch:
    """whole: names of the inputs that are no rows."""

    def __init__(self, gm: GraphModule, signature: Signature, plan: Resolved, known: Decisions | None = None) -> None:
        self._plan, self._known, forward = plan, known, forward_of(gm, signature)
        self._nodes = [n for n in gm.graph.nodes if n in forward or n.op == "placeholder"]
        self._atoms = Atoms(self._nodes, known)
        self._held = {a for _, n in inputs_of(gm, signature, InputKind.PARAMETER) for a in self._all(n)}
        self._leads: set[Atom | None] = set()
        given = [(e, n) for e, n in inputs_of(gm, signature, InputKind.BATCH) if shape(n)]
        self._layouts = {n: input_layout(n, e.name, plan) for e, n in given} if plan.sequence else {}
        self._given, open_ = {node for _, node in given}, list[_Open]()
        for entry, node in given:
            layout = {} if entry.rows is False else told("in", entry.name, node, plan)
            if layout is None:
                open_.append(_Open(entry.name, node, self._lead(node, 0), self._all(node, 1)))
                continue
            dims: set[int] = {layout[a].dim for a in plan.batch_axes if hasattr(layout.get(a), "dim")}
            self._leads |= {self._lead(node, d) for d in dims}
            self._held |= {a for d in range(len(shape(node))) if d not in dims for a in self._atoms.of(node, d)}
        self._rows = self._chosen(open_)
        self.whole = {x.name for x in open_ if x not in self._rows}
        self._leads = (self._leads | {x.lead for x in self._rows}) - {None}

    def _chosen(self, inputs: list[_Open]) -> list[_Open]:
        """Those that are rows; all, where the graph speaks against each of them."""
        found = [x for x in inputs if x.lead is None or not (x.lead in self._held or _is_column(x, inputs))] or inputs
        many = self._leads - {None} or (found and found[0].lead is not None)
        return [x for x in found if x.lead is not None or not many]

    def check(self) -> None:
        """Raises PlanError where the rows of two inputs are different dims of one value, or one has one row and
        another one more: they may be pairs, or the same things for every row."""
        leads = {x.lead: x.name for x in reversed(self._rows)}
        if len(leads) < 2:
            return
        first = self._rows[0]
        others = {a: name for a, name in leads.items() if a is not None and a is not first.lead}
        if first.lead is None:
            raise self._unknown(first.name, min(others.values()))
        for node in self._nodes:
            every = self._all(node)
            for lead in (a for a in others if a in every):
                if any(a in every and a is not lead for a in self._leads):
                    raise self._unknown(first.name, others[lead])

    def _unknown(self, first: str, other: str) -> PlanError:
        axis, *more = self._plan.mesh.names
        axis = self._plan.batch_axes[0]
        same, part = ("Layout()", f"Layout({axis}=Shard(0))") if more else ("Replicate()", "Shard(0)")
        return PlanError(
            f"{other} may be a part of the batch, as {first} is, or the same on every rank",
            help=f"say which: compile(..., inputs={{{other!r}: {part}}}) or inputs={{{other!r}: {same}}}",
        )

    def rows_of(self, node: Node) -> int | None:
        """Along which dim an output is split as the batch is; None where it has no rows of it."""
        dims = range(len(shape(node)))
        led = [d for d in dims if self._lead(node, d) in self._leads]
        inside = [d for d in dims if not self._leads.isdisjoint(self._atoms.of(node, d))]
        if led or inside:
            return (led or inside)[0]
        return 0 if dims and any(map(self._loses, self._behind(node))) else None

    def length_of(self, node: Node, axis: str) -> int | None:
        """Along which dim an output is split as sequences are over a mesh dim; None where it has none of theirs."""
        met = [(n, layout[axis].dim) for n, layout in self._layouts.items() if hasattr(layout.get(axis), "dim")]
        lengths = {a for n, dim in met for a in [self._lead(n, dim)]} - {None}
        dims = range(len(shape(node)))
        led = [d for d in dims if self._lead(node, d) in lengths]
        return next(iter(led or [d for d in dims if not lengths.isdisjoint(self._atoms.of(node, d))]), None)

    def depends(self, node: Node) -> bool:
        """Whether a value is made of any input."""
        return not self._given.isdisjoint(self._behind(node))

    def _behind(self, node: Node) -> set[Node]:
        seen, stack = {node}, [node]
        while stack:
            new = [n for n in stack.pop().all_input_nodes if n not in seen]
            seen.update(new)
            stack += new
        return seen

    def _loses(self, node: Node) -> bool:
        """Whether rows become something here that no rule can follow: neither are they there, nor reduced."""
        rows = any(not self._leads.isdisjoint(self._all(n)) for n in operands(node))
        if not rows or not self._leads.isdisjoint(self._all(node)) or not isinstance(node.target, OpOverload):
            return False
        rule = call_rule(node, self._known)
        if rule is None:
            return any(x.dim() for x in tensors(node))
        before = {name for value in rule.operands for dim in value for name in dim}
        return any(name not in before for value in rule.results for dim in value for name in dim)

    def _lead(self, node: Node, dim: int) -> Atom | None:
        """The outermost atom of a dim; None of one row."""
        return next(iter(self._atoms.of(node, dim)), None)

    def _all(self, node: Node, first: int = 0) -> set[Atom]:
        values = enumerate(tensors(node))
        return {a for i, x in values for d in range(first, x.dim()) for a in self._atoms.of(node, d, i)}


def _is_column(x: _Open, inputs: Sequence[_Open]) -> bool:
    """Whether the rows of an input are another dim of one that is rows itself."""
    return any(x.lead in other.beside and other.lead not in {x.lead, *x.beside} for other in inputs)
