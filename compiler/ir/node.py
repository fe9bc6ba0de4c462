"""A node as every pass sees it: the one place that knows what `node.meta` holds.

Its value and layouts are asked for by functions (`val`, `tensors`, `spec`, `specs`), all else by `of(node)`: what
`View` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch
from torch.fx import Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.rules.facts import draws, raises
from shardc.compiler.rules.table import OpRule, tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import named_shape
from shardc.compiler.spec.spec import Spec

T = TypeVar("T")


class Said(Generic[T]):
    """One thing that nodes may say of themselves."""

    def __init__(self, default: T, inherited: bool = False) -> None:
        self.default, self.inherited = default, inherited

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = name

    @overload
    def __get__(self, view: None, owner: type) -> Said[T]: ...
    @overload
    def __get__(self, view: View, owner: type) -> T: ...
    def __get__(self, view: View | None, owner: type) -> T | Said[T]:
        return self if view is None else view.meta.get(self.key, self.default)

    def __set__(self, view: View, value: T) -> None:
        view.meta[self.key] = value


class View:
    """What is known of a node beside its call, value and layouts; `inherited`: so is what is made beside it."""

    __slots__ = ("meta",)

    def __init__(self, node: Node) -> None:
        self.meta = node.meta

    def __contains__(self, name: str) -> bool:
        return name in self.meta

    where = Said("", inherited=True)  # "file.py:23 in forward", the user's line
    file = Said("", inherited=True)
    line = Said(0, inherited=True)
    path = Said("", inherited=True)  # FQN of the module it comes from
    phase = Said("forward", inherited=True)  # or "backward"
    region = Said("", inherited=True)  # of forward, that backward runs again; "" for none
    custom = Said[Any](None, inherited=True)  # what `torch.fx.traceback.annotate` said of its region
    # Whether sizes or numbers in the call are decided by what a tensor holds: it runs whole on every rank.
    data = Said(False, inherited=True)
    by_origin = Said(False, inherited=True)  # whether rows lie, or are pointed to, in an order that is each rank's own
    unit = Said[str | None](None, inherited=True)  # the gather unit that a collective serves; "" is the root
    regather = Said(False, inherited=True)  # whether a gather is made again in backward
    # Of a gather, the layout in which parameters stay until backward; of a slice, that it is one of these.
    kept = Said[Any](None, inherited=True)
    made_by = Said[str | None]("")  # the pass that created the node; None until the runner says so
    why = Said("")  # the plan entry behind a fixed layout
    wish = Said[tuple](())  # what the plan says of a mark: (mesh dim, placement, open, reason) of each entry
    wants = Said[tuple[Spec, ...] | None](None)  # the layouts it needs of its operands
    rule = Said[OpRule | None](None)  # ... by which that was found
    fixed = Said(False)  # whether its layouts, and the rule they come from, are the only ones it can have
    origin = Said("")  # the value of the global graph that this one is
    wire = Said[torch.dtype | None](None)  # in which a value travelled
    local = Said[Any](None)  # tensor(s) on meta of what rank 0 holds
    divided = Said(1)  # of a tangent, or of a parameter for its gradient: over how many losses that is averaged


of = View
INHERITED = tuple(name for name, said in vars(View).items() if isinstance(said, Said) and said.inherited)


def val(node: Node) -> Any:
    """The node's fake tensor, or tuple of them, at global shape."""
    return node.meta.get("val")


def set_val(node: Node, value: Any) -> None:
    node.meta["val"] = value


def tensors(node: Node) -> list[torch.Tensor]:
    return tensors_in(val(node))


def specs(node: Node) -> tuple[Spec, ...]:
    """The layouts of a node's results; empty before propagation has reached it."""
    spec = node.meta.get("spec")
    return spec if isinstance(spec, tuple) else (spec,) if spec is not None else ()


def spec(node: Node) -> Spec:
    """The layout of a node with one result."""
    return node.meta["spec"]


def set_spec(node: Node, layout: Spec) -> None:
    node.meta["spec"] = layout


def set_specs(node: Node, results: tuple[Spec, ...]) -> None:
    """Give a node its results' layouts, in the form its value has (one tensor, or several)."""
    node.meta["spec"] = results[0] if isinstance(val(node), torch.Tensor) else results


def operands(node: Node) -> list[Node]:
    """A node's tensor operands in argument order, repeats kept: the order rules count in."""
    out: list[Node] = []

    def visit(tree: Any) -> None:
        if isinstance(tree, Node):
            if isinstance(val(tree), torch.Tensor):
                out.append(tree)
        elif isinstance(tree, (list, tuple)):
            for item in tree:
                visit(item)
        elif isinstance(tree, dict):
            for item in tree.values():
                visit(item)

    visit(node.args)
    visit(node.kwargs)
    return out


def map_operands(node: Node, fn: Callable[[int, Node], Node]) -> None:
    """Replace each tensor operand, counted as `operands` counts, by fn(i, operand)."""
    count = -1

    def visit(tree: Any) -> Any:
        nonlocal count
        if isinstance(tree, Node):
            if not isinstance(val(tree), torch.Tensor):
                return tree
            count += 1
            return fn(count, tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)(visit(item) for item in tree)
        if isinstance(tree, dict):
            return {k: visit(v) for k, v in tree.items()}
        return tree

    node.args = visit(tuple(node.args))
    node.kwargs = visit(dict(node.kwargs))


def shape(node: Node) -> tuple[int, ...]:
    """Global shape of a node with one result."""
    return named_shape(val(node))


def arguments(node: Node) -> tuple[Any, ...]:
    """A call's positional arguments; torch.fx's own type for them allows everything, and so nothing."""
    return node.args


def result_number(node: Node, index: int) -> int:
    """Which of a node's tensors its result number `index` is; results that are None are not counted."""
    return len(tensors_in(list(val(node))[:index]))


def nbytes(node: Node) -> int:
    """Bytes of the global value(s)."""
    return sum(t.numel() * t.element_size() for t in tensors(node))


def local_value(node: Node, mesh: Mesh) -> Any:
    """What rank 0, which holds the largest piece of everything, holds of a node, on meta; of several results those
    that are None keep their place."""
    values, layouts, at = tensors(node), specs(node), mesh.coords(0)
    if not layouts or len(layouts) != len(values):
        return of(node).local
    pairs = zip(values, layouts, strict=True)
    made = [torch.empty(layout.local_shape(mesh, at), dtype=t.dtype, device="meta") for t, layout in pairs]
    if isinstance(val(node), torch.Tensor):
        return made[0]
    return tuple(made.pop(0) if isinstance(x, torch.Tensor) else None for x in val(node))


def local_nbytes(node: Node, mesh: Mesh) -> int:
    """Bytes that rank 0 holds of a node."""
    return sum(t.numel() * t.element_size() for t in tensors_in(local_value(node, mesh)))


def is_random(node: Node) -> bool:
    return draws(node.target, node.args, node.kwargs)


def stays(node: Node) -> bool:
    """Whether a call is made though nobody needs its result: it draws, or raises where one device would."""
    return is_random(node) or raises(node.target)


def together(a: Node, b: Node) -> bool:
    """Whether two calls run at the same times: in one half, in one region that is run again, both whole or not."""
    a_, b_ = of(a), of(b)
    return (a_.phase, a_.region, a_.data) == (b_.phase, b_.region, b_.data)


def target_name(target: Any) -> str:
    """`aten.mm`, `aten.add.Scalar`, `shardc.all_gather`, `getitem`."""
    if hasattr(target, "overloadpacket"):
        return str(target).removesuffix(".default")
    if target in c.SYMBOLIC:
        return f"shardc.{target.__name__}"
    return getattr(target, "__name__", str(target))


def sign(node: Node, name: str, new: bool) -> None:
    """Say which pass made a node: one that is new, or became another call."""
    if node.meta.get("made_by", None if new else "") is None:
        node.meta["made_by"] = name


def parts(node: Node) -> tuple:
    """All that a node's line and its invariants are made from, but for its operands' and users' own."""
    meta = node.meta
    said = (meta.get("val"), meta.get("spec"), meta.get("wants"), meta.get("made_by"), meta.get("local"))
    return node.name, node.target, node.args, node.kwargs, *said
