"""How passes edit a graph: calls that inherit what they should, and drop what is stale. The runner says who made them.

emit(target, args, like)        a new call at the graph's insert point, which comes from where `like` does
become(new, old)                a node says all that another one says of its value, too
replace(node, by)               another node in a node's place; redirect(users, node, by): for some of its users
retarget(node, target, args)    another call in a node, of the same value
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from shardc.compiler.ir.node import INHERITED, of, set_spec, set_val, spec, specs, tensors, val
from shardc.compiler.rules.facts import CAST
from shardc.compiler.spec.sizes import name_shape, named_shape
from shardc.compiler.spec.spec import Spec

COMPUTED = object()
STALE = ("rule", "wants", "made_by")  # what is said of a call, not of its value


def emit(
    target: Any,
    args: tuple,
    like: Node,
    kwargs: Mapping[str, Any] | None = None,
    *,
    value: Any = COMPUTED,
    layout: Spec | None = None,
    **said: Any,
) -> Node:
    """A new call at the graph's insert point. value: where its operands' do not give it, or at some cost. said: what
    `of(node)` is to hold beside what is inherited from `like`."""
    node = like.graph.call_function(target, args, dict(kwargs or {}))
    inherit(node, like)
    value = compute(target, args, kwargs or {}) if value is COMPUTED else value
    if value is not None:
        set_val(node, value)
    if layout is not None:
        set_spec(node, layout)
    _say(node, said)
    return node


def compute(target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a call gives on the values of its operands."""
    args, kwargs = map_arg((args, dict(kwargs)), val)
    with torch.no_grad():
        return target(*args, **kwargs)


def inherit(new: Node, old: Node, names: Iterable[str] = INHERITED) -> None:
    """Let a node say this of what another one says, and nothing else."""
    new.meta = {name: old.meta[name] for name in names if name in old.meta}


def become(new: Node, old: Node, **said: Any) -> Node:
    """Let a node say of its value all that another one says, and this."""
    inherit(new, old, [name for name in old.meta if name not in STALE])
    _say(new, said)
    return new


def _say(node: Node, said: Mapping[str, Any]) -> None:
    view = of(node)
    for name, held in said.items():
        setattr(view, name, held)


def replace(node: Node, by: Node | Sequence[Any]) -> None:
    """Another node in a node's place, or of several results one for each that is used."""
    if not isinstance(by, (tuple, list)):
        node.replace_all_uses_with(by)  # pyright: ignore[reportArgumentType]
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{user.name} takes all results of {node.name} at once")
        replace(user, by[user.args[1]])  # pyright: ignore
    node.graph.erase_node(node)


def redirect(users: Iterable[Node], node: Node, by: Node) -> None:
    """Another node in a node's place, for these users alone."""
    for user in users:
        user.replace_input_with(node, by)


def retarget(node: Node, target: Any, args: tuple) -> None:
    """Another call in a node, of the same value and name."""
    if node.target is not target:
        of(node).made_by = None
    node.target, node.args = target, args
    forget(node, "rule", "wants")


def forget(node: Node, *names: str) -> None:
    for name in names:
        node.meta.pop(name, None)


def cast(value: Node, dtype: torch.dtype) -> Node:
    """The value in another dtype, at the graph's insert point; what it was cast from, if that has this one."""
    have = tensors(value)[0]
    if have.dtype is dtype:
        return value
    if value.target is CAST and _holds(have.dtype, dtype):
        source = value.all_input_nodes[0]
        if tensors(source)[0].dtype is dtype:
            return source
    made = name_shape(have.to(dtype), named_shape(have))
    view, layout = of(value), spec(value) if specs(value) else None
    return emit(
        CAST, (value,), value, {"dtype": dtype}, value=made, layout=layout,
        origin=view.origin, why=view.why, wire=have.dtype,
    )  # fmt: skip


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the one is a number of the other."""
    return torch.promote_types(wide, narrow) is wide
