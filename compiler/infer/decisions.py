"""What was decided of calls within one lowering, and the rules by which: equal calls are decided once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from shardc.compiler.errors import ShardingError
from shardc.compiler.infer.infer import Decision, decide
from shardc.compiler.ir.node import nbytes, of, operands, tensors, val
from shardc.compiler.rules.table import TABLE, OpRule, RuleError, rule_of
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import named_shape
from shardc.compiler.spec.spec import Spec, axes_of

T = TypeVar("T")


class Decisions:
    """What was decided within one lowering: repeated layers are decided once.

    A rule is kept by all that it is made from, the operator, its static arguments, and what there is to know of its
    operands and results as tensors; a decision by the rule, the operands' layouts and bytes, the mesh, and where sums
    are put off. like: those of a lowering of the same graph at other sizes, which are taken over: what is less work
    there may not be here, but it is the same program.
    """

    def __init__(self, like: Decisions | None = None) -> None:
        self._like = like
        self._by_call: dict[Any, Decision] = {}
        self._once: dict[str, Any] = {}
        self._tensors: dict[int, tuple[torch.Tensor, tuple, int]] = {}  # held, so that no other gets its number
        self._rules: dict[Any, OpRule | None] = {}
        self._decided: dict[Any, tuple[OpRule, Decision]] = {}

    def anew(self) -> Decisions:
        """For another lowering of the same graph: calls that come the same way are known, answers are not."""
        other = Decisions()
        other._tensors, other._rules, other._decided = self._tensors, self._rules, self._decided
        return other

    def __len__(self) -> int:
        return len(self._decided)

    def rule(self, node: Node) -> OpRule | None:
        """As `call_rule`."""
        seen: dict[int, int] = {}
        try:
            call = self._frozen((node.args, node.kwargs, val(node)), seen)
            key = (node.target, TABLE.get(node.target), call)
            known = key in self._rules
        except TypeError:  # an argument that has no hash, as a slice
            return _rule(node)
        if not known:
            self._rules[key] = _rule(node)
        return self._rules[key]

    def decide(self, rule: OpRule, node: Node, specs: Sequence[Spec], mesh: Mesh, put_off: Sequence[str]) -> Decision:
        """As `decide`, of a node that has this rule."""
        sizes = [self._of(val(n))[2] for n in operands(node)]
        call = (node.name, tuple([(tuple([axes_of(d) for d in s.dims]), s.pending) for s in specs]))
        before = self._like._by_call.get(call) if self._like is not None else None
        key = (id(rule), tuple(specs), tuple(sizes), mesh, tuple(put_off), before and (before.choices, before.passing))
        if key not in self._decided:
            self._decided[key] = rule, decide(rule, specs, sizes, mesh, put_off, before)
        found = self._by_call[call] = self._decided[key][1]
        return found

    def once(self, question: str, answer: Callable[[], T]) -> T:
        """What else depends on sizes, asked of one lowering: as it was answered at the other sizes, if it was."""
        if self._like is not None and question in self._like._once:
            return self._like._once[question]
        return self._once.setdefault(question, answer())

    def _of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple, int]:
        known = self._tensors.get(id(tensor))
        if known is None:
            strides = tensor.stride() if tensor.layout is torch.strided else ()
            form = (type(tensor), tuple(tensor.shape), strides, tensor.dtype, tensor.device, tensor.layout)
            flags = (tensor.storage_offset() if strides else 0, tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
            known = self._tensors[id(tensor)] = tensor, form + flags, tensor.numel() * tensor.element_size()
        return known

    def _frozen(self, tree: Any, seen: dict[int, int]) -> Any:
        """Arguments as a key: 1, 1.0 and True are three, and so are one tensor twice and two that are alike."""
        if isinstance(tree, Node):
            tree = val(tree)
        if isinstance(tree, torch.Tensor):
            return seen.setdefault(id(tree), len(seen)), self._of(tree)[1]
        if isinstance(tree, (list, tuple)):
            return type(tree), *[self._frozen(item, seen) for item in tree]
        if isinstance(tree, dict):
            return tuple([(key, self._frozen(item, seen)) for key, item in tree.items()])
        return type(tree), repr(tree) if isinstance(tree, (float, complex)) else tree


def call_rule(node: Node, known: Decisions | None = None) -> OpRule | None:
    """The rule of one call in a graph, fitted to its shapes; None for an operator without one, and where data decides
    sizes or numbers. Raises ShardingError at the user's line where the rule does not fit this call."""
    view = of(node)
    if view.data:
        return None
    if "rule" not in view:
        view.rule = _rule(node) if known is None else known.rule(node)
    return view.rule


def _rule(node: Node) -> OpRule | None:
    args, kwargs = map_arg((node.args, node.kwargs), val)
    try:
        return rule_of(node.target, args, kwargs, val(node))
    except RuleError as error:
        raise ShardingError(
            f"{node.target} cannot be sharded as it is called here: {error}",
            where=of(node).where,
            help="write it with other operators, or correct its rule (shardc.check_rule proves one)",
        ) from error


def decide_node(
    node: Node, specs: Sequence[Spec], mesh: Mesh, put_off: Sequence[str] = (), known: Decisions | None = None
) -> Decision:
    """Lay out one call of a graph; an operator without a rule gets whole operands. put_off: as in `decide`."""
    rule = call_rule(node, known)
    if rule is None:
        whole = tuple(Spec.whole(named_shape(t)) for t in tensors(node))
        return Decision((), tuple(Spec.whole(s.shape) for s in specs), whole, ())
    if known is not None:
        return known.decide(rule, node, specs, mesh, put_off)
    return decide(rule, specs, [nbytes(n) for n in operands(node)], mesh, put_off)
