"""A collective whose result is not needed at once is started early and waited for late.

    %mm: f32[8, 16]+dp = aten.mm(%t, %tangent)
    %all_reduce: f32[8, 16] = shardc.all_reduce(%mm, dp)
    %mm_1: f32[32, 8] = aten.mm(%tangent, %w)
    return (%all_reduce, %mm_1)
  ==>
    %mm: f32[8, 16]+dp = aten.mm(%t, %tangent)
    %start_all_reduce: f32[8, 16] = shardc.start(%mm, all_reduce, dp)
    %mm_1: f32[32, 8] = aten.mm(%tangent, %w)
    %all_reduce: f32[8, 16] = shardc.wait(%start_all_reduce)
    return (%all_reduce, %mm_1)

Forward comes first, then backward; nothing crosses from one to the other. A reduction starts when its operand
is ready and is waited for as late as `window` bytes in flight allow; that of a unit's gradients until the next unit's
starts, else the gradients of all units would be there whole at the end. A gather, whose result is larger than
what it gathers, is waited for where it is used and started as early as `window` and `ahead` allow; that of a unit's
parameters only while the parameters of fewer than `units` units are held, the root's included. Left alone: a
collective with no computation between its operand and its first use, or over one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import COLLECTIVES, all_gather, reduce_scatter, start, wait
from shardc.compiler.ir.graph import call_nodes, forward_of
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import local_nbytes, of
from shardc.compiler.ir.rewrite import become
from shardc.compiler.ir.views import is_kept, last_uses
from shardc.compiler.pipeline.runner import Context, PassResult
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.rules.facts import computes
from shardc.compiler.spec.mesh import Mesh


@dataclass(frozen=True)
class Overlap:
    """window: bytes of results that may be in flight at once. ahead: how many gathers may be; at least one.
    units: of how many units parameters may be held or under way for the sake of an early start."""

    window: int = 256 * 2**20
    ahead: int = 2
    units: int = 2

    name = "overlap"
    takes = Stage.LOCAL
    gives = Stage.SCHEDULED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        forward = forward_of(gm, ctx.signature)
        calls = call_nodes(gm)
        halves = [[n for n in calls if (n in forward) is first] for first in (True, False)]
        end = gm.graph.output_node()
        for half in halves:
            schedule = _Schedule(half, ctx.mesh, self.window, self.ahead, self.units)
            for node in schedule.order():
                end.prepend(node)
            changes["started"] += len(schedule.starts)
        return PassResult(changes)


@dataclass
class _Schedule:
    """One half in order. Slot i is the gap before its i-th node; the last slot is its end."""

    nodes: Sequence[Node]
    mesh: Mesh
    window: int
    ahead: int
    units: int
    starts: dict[Node, int] = field(default_factory=dict)  # collective -> slot
    waits: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at = {node: i for i, node in enumerate(self.nodes)}
        self._flying = [0] * len(self.nodes)  # bytes under way while a node runs
        self._gathers = [0] * self.ahead  # the slots where the last of them were needed
        self._arrived = 0  # behind the last unit's gather: its message must be gone before the next comes
        self._reductions: list[Node] = []
        self._held: list[set[str]] = [set() for _ in self.nodes]  # the units whose parameters are there
        last = last_uses(self.nodes)
        for node in self.nodes:
            if _unit(node) is not None:
                self._hold(node, self._at[node], max(last.get(n, 0) for n in (node, *node.users)) + 1)
        for node in self.nodes:
            if node.target in COLLECTIVES and self.mesh[_axis(node)] > 1:
                self._place(node)

    def _place(self, node: Node) -> None:
        ready, need, size = self._ready(node), self._need(node), local_nbytes(node, self.mesh)
        if _unit(node) is not None:
            begin, end = self._back(self._free(node, max(ready, self._arrived), need), need, size), need
            self._hold(node, begin, end)
            self._arrived = need + 1
        elif node.target is all_gather:
            begin, end = self._back(max(ready, self._gathers[0]), need, size), need
            self._gathers = [*self._gathers[1:], need]
        else:
            if _scatters_unit(node):
                self._end_units(ready)
            self._make_room(ready, size)
            begin, end = ready, self._on(ready, need, size)
            self._reductions.append(node)
        if any(computes(n.target) for n in self.nodes[begin:end]):
            self.starts[node], self.waits[node] = begin, end
            self._fly(begin, end, size)

    def _hold(self, node: Node, begin: int, end: int) -> None:
        for held in self._held[begin:end]:
            held.add(str(of(node).unit))

    def _free(self, node: Node, ready: int, need: int) -> int:
        """The first slot from which one more unit may be held."""
        begin = need
        while begin > ready and len(self._held[begin - 1] | {str(of(node).unit)}) <= self.units:
            begin -= 1
        return begin

    def _make_room(self, slot: int, size: int) -> None:
        """Wait for the oldest reductions under way, if so much more may not fly."""
        for node in self._reductions:
            if slot == len(self.nodes) or self._flying[slot] + size <= self.window:
                return
            if node in self.starts and self.starts[node] < slot < self.waits[node]:
                self._fly(slot, self.waits[node], -local_nbytes(node, self.mesh))
                self.waits[node] = slot

    def _end_units(self, slot: int) -> None:
        """Wait for the last unit's gradients: while they are under way all ranks' summands are held too."""
        for node in filter(_scatters_unit, self._reductions):
            if node in self.starts and self.starts[node] < slot < self.waits[node]:
                self._fly(slot, self.waits[node], -local_nbytes(node, self.mesh))
                self.waits[node] = slot

    def _fly(self, begin: int, end: int, size: int) -> None:
        for i in range(begin, end):
            self._flying[i] += size

    def _ready(self, node: Node) -> int:
        """The first slot behind the operands."""
        return max(self._ready_one(node, operand) for operand in node.all_input_nodes)

    def _ready_one(self, node: Node, operand: Node) -> int:
        """Behind one of them. What backward computes again must not be computed sooner for this."""
        if operand in self.waits:
            return self.waits[operand]
        if operand.op != "placeholder" and operand not in self._at and not is_kept(operand):
            return self._at[node]
        return self._at.get(operand, -1) + 1

    def _need(self, node: Node) -> int:
        """The slot before the first use."""
        return min((self._at[user] for user in node.users if user in self._at), default=len(self.nodes))

    def _on(self, begin: int, need: int, size: int) -> int:
        """The last slot up to which so much more may fly."""
        end = begin
        while end < need and self._flying[end] + size <= self.window:
            end += 1
        return end

    def _back(self, ready: int, end: int, size: int) -> int:
        """The first slot from which so much more may fly."""
        begin = end
        while begin > ready and self._flying[begin - 1] + size <= self.window:
            begin -= 1
        while begin < end and not computes(self.nodes[begin].target):
            begin += 1  # not in the way of what is needed sooner
        return begin

    def order(self) -> list[Node]:
        """The half's nodes with starts made and waits moved."""
        begins: dict[int, list[Node]] = {}
        ends: dict[int, list[Node]] = {}
        for node, slot in self.starts.items():
            begins.setdefault(slot, []).append(node)
            ends.setdefault(self.waits[node], []).append(node)
        out: list[Node] = []
        for i in range(len(self.nodes) + 1):
            out += ends.get(i, [])
            out += [_start(node) for node in begins.get(i, [])]
            if i < len(self.nodes) and self.nodes[i] not in self.starts:
                out.append(self.nodes[i])
        return out


def _unit(node: Node) -> str | None:
    """The unit whose parameters a node gathers, if any."""
    return of(node).unit if node.target is all_gather else None


def _scatters_unit(node: Node) -> bool:
    return node.target is reduce_scatter and of(node).unit is not None


def _axis(node: Node) -> str:
    move = move_of(node)
    assert move is not None
    return move.axis


def _start(node: Node) -> Node:
    """The start of a collective, which itself becomes the wait for it."""
    operand, *rest = node.args
    args = (operand, node.target.__name__, *rest)  # pyright: ignore[reportAttributeAccessIssue]
    begun = node.graph.create_node("call_function", start, args, {}, f"start_{node.name}")
    node.target, node.args = wait, (begun,)
    return become(begun, node)
