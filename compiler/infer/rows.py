"""Rows by origin: what is sorted stays on the rank whose rows it comes from, in the order of that rank alone.

    %sort: (i64[128], i64[128]) = aten.sort(%experts)           experts: i64[128@dp]
    %index: f32[128, 32] = aten.index.Tensor(%x, [%rows])       rows: where in x each comes from
  ==>
    each rank sorts its own 128 / dp numbers, looks into its own rows of x, and multiplies these by their experts

Sorted rows of all ranks together are those of one device in another order. So whatever treats rows alike may go on
with them, a sum over them is a pending sum, and what looks up or adds by an index that points into a rank's own rows
ends them. A value is known by its `Rows`; a call for which no line here says what it may do with them is `Open`: the
rows that reach it are then sorted whole, as if there were nothing here. No such row is ever gathered: its place among
those of other ranks is nowhere known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from shardc.compiler.infer.decisions import Decisions, call_rule, decide_node
from shardc.compiler.infer.infer import arrange, splits_of
from shardc.compiler.infer.orders import (
    PLAIN,
    Open,
    Order,
    Rows,
    copies,
    counts_from_zero,
    descends,
    own_arange,
    pointed,
    words,
)
from shardc.compiler.ir.marks import MARK
from shardc.compiler.ir.node import (
    arguments,
    is_random,
    nbytes,
    of,
    operands,
    set_specs,
    shape,
    spec,
    specs,
    target_name,
    val,
)
from shardc.compiler.rules.table import OpRule, fit, parse
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Dim, Spec, axes_of, regroup, size_of

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable)
UNREAD = ("zeros_like", "empty_like", "new_zeros", "new_empty")  # of their operand only the shape is read
ZEROS = ("aten.zeros", "aten.zeros_like", "aten.new_zeros")
GROUPED = ("transformers.grouped_mm_fallback", "aten._grouped_mm")
GROUPED_BACKWARD = "transformers.grouped_mm_fallback_backward"


class RowsByOrigin:
    """What is known of the values that a sweep over a graph has passed. whole: lines whose rows are sorted whole."""

    def __init__(self, mesh: Mesh, known: Decisions, whole: set[str]) -> None:
        self._mesh, self._known, self._whole = mesh, known, whole
        self._of: dict[Node, tuple[Rows, ...]] = {}
        self.calls = 0

    def take(self, node: Node) -> bool:
        """Lay out a call whose rows lie by origin; False where it has none. Raises Open."""
        found = [self._one(n) for n in node.all_input_nodes]
        if node.target in SORTS and not any(rows.loose for rows in found):
            return self._begin(node)
        if not any(rows != PLAIN for rows in found):
            return False
        made = self._call(node)
        if made is None:
            if any(rows.loose for rows in found):
                raise Open(o for rows in found for o in rows.orders)
            return False
        self._keep(node, made)
        return True

    def pick(self, node: Node, result: int) -> None:
        """Of a result picked from several."""
        made = self._of.get(arguments(node)[0])
        if made is not None:
            self._keep(node, (made[result],))

    def end(self, values: Iterable[Any]) -> None:
        """What the graph returns. Raises Open."""
        found = [self._one(v) for v in values if isinstance(v, Node)]
        if any(rows.loose for rows in found):
            raise Open(o for rows in found for o in rows.orders)

    def _one(self, node: Node) -> Rows:
        return self._of.get(node, (PLAIN,))[0]

    def _keep(self, node: Node, made: Sequence[Rows]) -> None:
        self._of[node] = tuple(made)
        of(node).by_origin = any(rows.loose for rows in made)
        of(node).fixed = True
        self.calls += 1

    def _lay(self, node: Node, text: str, wants: Sequence[Spec], results: Sequence[Spec], **options: Any) -> None:
        """Fix a call's layouts. text: what its dims mean, of a rank's own rows."""
        shapes = [tuple(s.shape) for s in wants], [tuple(s.shape) for s in results]
        of(node).rule = fit(parse(text, **options), *shapes)
        of(node).wants = tuple(wants)
        set_specs(node, tuple(results))

    def _begin(self, node: Node) -> bool:
        x = arguments(node)[0]
        layout = spec(x)
        if len(layout.dims) != 1 or not layout.axes() or layout.pending or of(node).data:
            return False
        if of(node).where in self._whole:
            return False
        order = Order(layout.dims[0], node)
        self._lay(node, "n -> n, n", [layout], [layout, layout])
        key = not descends(node) and counts_from_zero(x)
        self._keep(node, (Rows(order, key=key), Rows(order, into=order.dim, onto=True)))
        return True

    def _call(self, node: Node) -> Sequence[Rows] | None:
        name, at = target_name(node.target), node.target
        if node.target in SORTS:
            return self._invert(node)
        if of(node).data or is_random(node):
            return None
        for targets, step in STEPS:
            if name in targets:
                return step(self, node)
        if name.removeprefix("aten.") in UNREAD:
            return self._unread(node)
        if at is MARK:
            return None
        return self._alike(node)

    # -- calls that only rows by origin have a form of ------------------------------------------------

    def _invert(self, node: Node) -> Sequence[Rows] | None:
        """The places of a permutation in order are the permutation back."""
        x = arguments(node)[0]
        rows = self._one(x)
        if not (rows.onto and rows.order is not None and isinstance(rows.into, tuple)) or descends(node):
            return None
        self._lay(node, "n -> n, n", [spec(x)], [spec(x), spec(x)])
        return Rows(None, into=rows.into, onto=True), Rows(None, into=rows.order, onto=True)

    def _divide(self, node: Node) -> Sequence[Rows] | None:
        """Of rows that lie in groups of k, the group: what points into rows then points into groups."""
        x, k = arguments(node)[:2]
        rows = self._one(x) if isinstance(x, Node) else PLAIN
        if rows.into is None:
            return self._alike(node)
        floor = target_name(node.target) == "aten.floor_divide" or node.kwargs.get("rounding_mode") == "floor"
        if not floor or not isinstance(rows.into, tuple) or type(k) is not int or k < 1 or size_of(rows.into) % k:
            return None
        groups = regroup(rows.into, (size_of(rows.into) // k, k), self._mesh)
        if groups is None or axes_of(groups[1]):
            return None
        self._lay(node, "n -> n", [spec(x)], [spec(x)])
        return (Rows(rows.order, into=groups[0]),)

    def _look_up(self, node: Node) -> Sequence[Rows] | None:
        x, indices = arguments(node)[:2]
        if len(indices) > 1 or self._one(indices[0]).into is None:
            return None if any(self._one(n).into is not None for n in operands(node)) else self._alike(node)
        return self._read(node, x, indices[0])

    def _read(self, node: Node, x: Node, index: Node) -> Sequence[Rows] | None:
        """Rows of x where an index points."""
        rows, source = self._one(index), self._one(x)
        if rows.into is None or len(shape(index)) != 1 or not self._lies(x, rows.into):
            return None
        tail = [f"d{i}" for i in range(1, len(shape(x)))]
        wants = [self._rows(shape(x), pointed(rows.into)), spec(index)]
        result = self._rows(shape(node), spec(index).dims[0])
        self._lay(node, f"{words('v', tail)}, k -> {words('k', tail)}", wants, [result], joined="v")
        return (Rows(rows.order, into=source.into),)

    def _put(self, node: Node) -> Sequence[Rows] | None:
        x, indices, values, *rest = arguments(node)
        if len(indices) > 1 or self._one(indices[0]).into is None:
            return None if any(self._one(n).into is not None for n in operands(node)) else self._alike(node)
        return self._write(node, x, indices[0], values, rest == [True])

    def _add(self, node: Node) -> Sequence[Rows] | None:
        x, dim, index, values = arguments(node)[:4]
        if self._one(index).into is None:
            return None if any(self._one(n).into is not None for n in operands(node)) else self._alike(node)
        return self._write(node, x, index, values, True) if dim == 0 else None

    def _select(self, node: Node) -> Sequence[Rows] | None:
        x, along, index = arguments(node)
        if self._one(index).into is None:
            return self._alike(node)
        return self._read(node, x, index) if along == 0 else None

    def _write(self, node: Node, x: Node, index: Node, values: Node, adds: bool) -> Sequence[Rows] | None:
        """Rows put, or added, where an index points."""
        rows, given = self._one(index), self._one(values)
        assert rows.into is not None
        if len(shape(index)) != 1 or shape(values) != (*shape(index), *shape(x)[1:]) or operands(node)[1] is not index:
            return None
        here, there = spec(index).dims[0], pointed(rows.into)
        into = None
        if size_of(there) != shape(x)[0] or not (adds or rows.onto):
            return None
        if rows.order is not None and not adds and (own := self._counted(node, values, rows.order)) is not None:
            values, into = own, rows.order
        elif given.into is not None or given.order is not rows.order or (given.order is not None and given.at):
            return None
        ends = self._one(x)
        if ends.loose and (adds or ends.order is not None and ends.at):
            return None
        if adds and isinstance(rows.into, Order) and target_name(x.target) not in ZEROS:
            return None
        tail = [f"d{i}" for i in range(1, len(shape(x)))]
        wants = [self._rows(shape(x), there), spec(index), self._rows(shape(values), here)]
        if ends.loose and spec(x) != wants[0]:
            return None
        text = f"{words('v', tail)}, k, {words('k', tail)} -> {words('v', tail)}"
        self._lay(node, text, wants, [wants[0]], joined="k")
        order = rows.into if isinstance(rows.into, Order) else None
        return (Rows(order, into=into, onto=into is not None),)

    def _counted(self, node: Node, values: Node, order: Order) -> Node | None:
        """0, 1, ... up to all rows of an order: on each rank, up to its own."""
        args = arguments(values)
        if (
            values.target is not aten.arange.default
            or args != (size_of(order.dim),)
            or val(values).dtype != torch.int64
        ):
            return None
        with node.graph.inserting_before(node):
            own = node.graph.node_copy(values)
        node.replace_input_with(values, own)
        self._lay(own, "-> n", [], [self._rows(shape(own), order.dim)], localize=own_arange)
        of(own).by_origin = of(own).fixed = True
        return own

    def _count(self, node: Node) -> Sequence[Rows] | None:
        """How many of each: of a rank's own rows, a summand."""
        x, *given = arguments(node)
        rows = self._one(x)
        if rows.order is None or rows.into is not None or len(shape(x)) != 1 or len(given) != 3 or given[1] == given[2]:
            return None  # where low equals high, the range is that of the numbers themselves
        self._lay(node, "n -> e", [spec(x)], [self._summed(shape(node), rows.order)], sum="n")
        return (Rows(counts=rows.order) if rows.key and given[1] == 0 else PLAIN,)

    def _accumulate(self, node: Node) -> Sequence[Rows] | None:
        x = arguments(node)[0]
        rows = self._one(x)
        if rows.counts is None:
            return self._alike(node) if rows.loose else None
        if len(shape(x)) != 1:
            return None
        self._lay(node, "e -> e", [spec(x)], [spec(x)], whole="e")
        return (Rows(ends=rows.counts),)

    def _grouped(self, node: Node) -> Sequence[Rows] | None:
        if len(operands(node)) != 3:
            return None
        a, b, ends = operands(node)
        order, left, right = self._one(ends).ends, self._one(a), self._one(b)
        if order is None or left.order is not order or left.into is not None:
            return None
        wants = [spec(a), Spec.whole(shape(b)), spec(ends)]
        if len(shape(a)) == 2 and len(shape(b)) == 3 and left.at == 0 and not right.loose:
            result = self._rows(shape(node), order.dim)
            self._lay(node, "s d, e d f, e -> s f", wants, [result], whole="d e f")
            return (Rows(order),)
        if len(shape(a)) == len(shape(b)) == 2 and (left.at, right) == (1, Rows(order)):
            wants[1] = spec(b)
            self._lay(node, "d s, s f, e -> e d f", wants, [self._summed(shape(node), order)], sum="s", whole="d e f")
            return (PLAIN,)
        return None

    def _grouped_backward(self, node: Node) -> Sequence[Rows] | None:
        x, weight, ends, grad = operands(node)
        order = self._one(ends).ends
        if order is None or self._one(weight).loose or self._one(x) != Rows(order) or self._one(grad) != Rows(order):
            return None
        wants = [spec(x), Spec.whole(shape(weight)), spec(ends), spec(grad)]
        results = [self._rows(shape(x), order.dim), self._summed(shape(weight), order)]
        self._lay(node, "s d, e d f, e, s f -> s d, e d f", wants, results, joined="s", whole="d e f")
        return Rows(order), PLAIN

    # -- calls that treat rows alike, whatever they are ----------------------------------------------

    def _unread(self, node: Node) -> Sequence[Rows] | None:
        """What has the shape of rows, and nothing of them."""
        decision = decide_node(node, [spec(n) for n in operands(node)], self._mesh, known=self._known)
        if decision.operands != tuple(spec(n) for n in operands(node)):
            return None
        of(node).wants = decision.operands
        set_specs(node, decision.results)
        return (PLAIN,)

    def _alike(self, node: Node) -> Sequence[Rows] | None:
        """By the operator's own rule, where it takes every row for itself, or adds rows up."""
        found = [self._one(n) for n in operands(node)]
        orders = {rows.order for rows in found if rows.order is not None}
        loose = [rows for rows in found if rows.loose]
        if not loose:
            return None

        if any(rows.into is not None for rows in loose) and not copies(node):  # a place is no number to reckon with
            return None
        rule = call_rule(node, self._known)
        if rule is None or len(orders) > 1:
            return None
        if not orders:
            of(node).wants = tuple(spec(n) for n in operands(node))
            set_specs(node, specs(operands(node)[0]))
            return loose  # a copy of where rows lie
        (order,) = orders
        factors = {self._factor(rule.operands[i], rows.at) for i, rows in enumerate(found) if rows.order is order}
        if len(factors) != 1 or None in factors:
            return None
        ((factor),) = factors
        return self._split(node, rule, order, str(factor), found)

    def _split(
        self, node: Node, rule: OpRule, order: Order, factor: str, found: Sequence[Rows]
    ) -> Sequence[Rows] | None:
        needed = (
            rule.whole
            | rule.plain
            | rule.joined
            | rule.lone
            | rule.nonempty
            | {f for pair in rule.follows for f in pair}
        )
        summed = dict(rule.reductions).get(factor)
        if factor in needed or summed not in (None, "sum") or (summed and rule.localize is not None):
            return None
        for rows, names in zip(found, rule.operands, strict=True):  # rows of one device beside rows of another order
            if rows.order is not order and any(factor in dim for dim in names):
                return None
        choices: dict[str, str | None] = dict.fromkeys(axes_of(order.dim), factor)
        groups = dict.fromkeys(choices, frozenset[int]())
        values = operands(node)
        splits = [splits_of(names, spec(n), rule, self._mesh) if rows.order is order else {}
                  for names, n, rows in zip(rule.operands, values, found, strict=True)]  # fmt: skip
        made = arrange(rule, choices, groups, splits, [nbytes(n) for n in values], self._mesh)
        if made.factor(factor) != order.dim:
            return None
        if any(
            rows.order is order and want != spec(n) for rows, want, n in zip(found, made.operands, values, strict=True)
        ):
            return None
        of(node).wants = made.operands
        set_specs(node, made.results)
        kept = next((rows for rows in found if rows.order is order), PLAIN) if copies(node) else Rows(order)
        out = []
        for names in rule.results:
            where = [d for d, dim in enumerate(names) if factor in dim]
            if where and names[where[0]] != (factor,):
                return None
            out.append(replace(kept, at=where[0]) if where else PLAIN)
        return out

    @staticmethod
    def _factor(names: Sequence[tuple[str, ...]], at: int) -> str | None:
        return names[at][0] if len(names[at]) == 1 else None

    # -- layouts ---------------------------------------------------------------------------------------

    def _lies(self, x: Node, into: Dim | Order) -> bool:
        """Whether the rows of x are those that an index points into."""
        rows = self._one(x)
        if isinstance(into, Order):
            return rows.order is into and rows.at == 0
        return not rows.loose and shape(x)[0] == size_of(into)

    def _rows(self, sizes: Sequence[int], dim: Dim) -> Spec:
        return Spec.whole(sizes).with_dim(0, dim)

    def _summed(self, sizes: Sequence[int], order: Order) -> Spec:
        return Spec.whole(sizes).with_pending(dict.fromkeys(axes_of(order.dim), "sum"), self._mesh)


STEPS: tuple[tuple[tuple[str, ...], Callable[[RowsByOrigin, Node], Sequence[Rows] | None]], ...] = (
    (("aten.floor_divide", "aten.div.Tensor_mode"), RowsByOrigin._divide),
    (("aten.index.Tensor",), RowsByOrigin._look_up),
    (("aten.index_put",), RowsByOrigin._put),
    (("aten.index_add",), RowsByOrigin._add),
    (("aten.index_select",), RowsByOrigin._select),
    (("aten.histc",), RowsByOrigin._count),
    (("aten.cumsum",), RowsByOrigin._accumulate),
    (GROUPED, RowsByOrigin._grouped),
    ((GROUPED_BACKWARD,), RowsByOrigin._grouped_backward),
)
