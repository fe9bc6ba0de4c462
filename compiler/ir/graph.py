"""The graph as every pass sees it: the one place that knows what `node.meta` holds.

val      fake tensor(s) at global shape           spec    Spec, or a tuple of Specs for several results
wants    layouts a node needs of its operands     where   "file.py:23 in forward", the user's line
path     FQN of the module a node comes from      phase   "forward" | "backward"
made_by  the pass that created the node           wish    what the plan says of a mark (seed_plan)
why      the plan entry behind a fixed layout     recompute   region run again in backward
local    tensor(s) on meta of what rank 0 holds   origin  the value of the global graph that this one is
wire     the dtype in which a value travelled     custom  what `torch.fx.traceback.annotate` said of its region
unit     the gather unit a collective serves      regather    whether a gather is made again in backward
kept     of a gather, the layout in which parameters stay until backward; of a slice, that it is one of these
data     whether sizes or numbers in the call are decided by what a tensor holds: it runs whole on every rank
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.ir import collectives as c
from shardc.compiler.rules.checks import CHECKS
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import name_shape, named_shape
from shardc.compiler.spec.spec import Spec

CAST = torch.ops.aten._to_copy.default
ASSERT = torch.ops.aten._assert_scalar.default
INHERITED = ("where", "file", "line", "path", "phase", "recompute", "regather", "unit", "kept", "custom", "data")


def val(node: Node) -> Any:
    """The node's fake tensor, or tuple of them, at global shape."""
    return node.meta.get("val")


def tensors(node: Node) -> list[torch.Tensor]:
    return tensors_in(val(node))


def specs(node: Node) -> tuple[Spec, ...]:
    """The layouts of a node's results; empty before propagation has reached it."""
    spec = node.meta.get("spec")
    return spec if isinstance(spec, tuple) else (spec,) if spec is not None else ()


def spec(node: Node) -> Spec:
    """The layout of a node with one result."""
    return node.meta["spec"]


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


def result_number(node: Node, index: int) -> int:
    """Which of a node's tensors its result number `index` is; results that are None are not counted."""
    return len(tensors_in(list(val(node))[:index]))


def nbytes(node: Node) -> int:
    """Bytes of the global value(s)."""
    return sum(t.numel() * t.element_size() for t in tensors(node))


def insert(graph: Graph, target: Any, args: tuple, like: Node, result: Spec | None = None, **meta: Any) -> Node:
    """A new node at the graph's insert point, with `like`'s value and source; the caller names its layout."""
    node = graph.call_function(target, args)
    node.meta = {k: like.meta[k] for k in ("val", *INHERITED) if k in like.meta} | meta
    if result is not None:
        node.meta["spec"] = result
    return node


def cast(value: Node, dtype: torch.dtype) -> Node:
    """The value in another dtype, at the graph's insert point; what it was cast from, if that has this one."""
    have = tensors(value)[0]
    if have.dtype is dtype:
        return value
    if value.target is CAST and _holds(have.dtype, dtype):
        source = value.all_input_nodes[0]
        if tensors(source)[0].dtype is dtype:
            return source
    node = value.graph.call_function(CAST, (value,), {"dtype": dtype})
    kept = ("spec", "origin", "why", *INHERITED)
    node.meta = {k: value.meta[k] for k in kept if k in value.meta} | {"wire": have.dtype}
    node.meta["val"] = name_shape(have.to(dtype), named_shape(have))
    return node


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the one is a number of the other."""
    return torch.promote_types(wide, narrow) is wide


class Call(NamedTuple):
    """A collective or local move, whether it stands in the graph as itself or is started there."""

    target: Any
    args: tuple  # the operand first
    meta: dict[str, Any]

    @property
    def axis(self) -> str:
        return next(a for a in self.args[1:] if isinstance(a, str))

    def each(self) -> Iterator[Call]:
        """The values that move together, each as a call of its own: (operand, dim, mesh dim, ...)."""
        values, *rest = self.args
        if isinstance(values, Node):
            yield self
            return
        dims, *rest = rest
        for value, dim, layout in zip(values, dims, self.meta["spec"], strict=True):
            yield Call(self.target, (value, dim, *rest), {**self.meta, "spec": layout})


def move_of(node: Node) -> Call | None:
    """What a node moves, if anything; a `wait` moves nothing."""
    if node.target is c.start:
        operand, kind, *rest = node.args
        return Call(c.NAMED[kind], (operand, *rest), node.meta)  # pyright: ignore[reportArgumentType]
    if node.op == "call_function" and node.target in (*c.COLLECTIVES, *c.LOCAL_MOVES):
        return Call(node.target, tuple(node.args), node.meta)
    return None


def divides_a_sum(node: Node, mesh: Mesh) -> bool:
    """Whether a node averages what a reduction gave, and nothing else sees: then it may do so where that lies.
    Over one rank the sum would be its operand."""
    if node.target is not torch.ops.aten.div.Tensor or node.kwargs or isinstance(node.args[1], Node):
        return False
    total = source = arguments(node)[0]
    if source.target is operator.getitem:  # one of several that move at once
        source = arguments(source)[0]
    move = move_of(arguments(source)[0] if source.target is c.wait else source)
    if move is None or move.target not in (c.all_reduce, c.reduce_scatter):
        return False
    if mesh[move.axis] == 1 or len(total.users) > 1:
        return False
    (value,) = tensors(total) or [total.meta.get("local")]
    return isinstance(value, Tensor) and value.dtype.is_floating_point


class Kind(NamedTuple):
    """How a tensor lies in memory, and where."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def local_nbytes(node: Node, mesh: Mesh) -> int:
    """Bytes rank 0, which holds the largest piece of everything, holds of a node."""
    values, layouts = tensors(node), specs(node)
    if layouts and len(layouts) == len(values):
        shapes = [s.local_shape(mesh, mesh.coords(0)) for s in layouts]
        return sum(math.prod(n) * t.element_size() for n, t in zip(shapes, values, strict=True))
    return sum(t.numel() * t.element_size() for t in tensors_in(node.meta.get("local")))


def call_nodes(gm: GraphModule, *targets: Any) -> list[Node]:
    """The graph's operator calls in order, or those of the given targets."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    return [n for n in nodes if n.target in targets] if targets else nodes


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers; attention without dropout is tagged so but does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [a.name for a in node.target._schema.arguments]  # pyright: ignore
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("dropout_p", None) != 0)


def stays(node: Node) -> bool:
    """Whether a call is made though nobody needs its result: it draws, or raises where one device would."""
    return is_random(node) or node.target in CHECKS or node.target is ASSERT


def is_kept(node: Node) -> bool:
    """Whether a node is what forward keeps of a gathered parameter for backward: memory of its own."""
    return node.target is c.local_slice and bool(node.meta.get("kept"))


def outlives(node: Node) -> bool:
    """Whether a slice is to have memory of its own, lest it hold that of the whole: what is kept, and a gradient."""
    return is_kept(node) or (node.meta.get("phase") == "backward" and any(user.op == "output" for user in node.users))


def early(gm: GraphModule) -> list[Node]:
    """What forward makes without needing it. Random draws and checks, used or not and in order: the generator moves
    on. And the pieces of parameters that it keeps for backward."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.meta.get("phase") != "backward"]
    return [n for n in nodes if stays(n) or is_kept(n)]


def output_node(gm: GraphModule) -> Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")


def returned(gm: GraphModule) -> list[Any]:
    """What the graph returns: nodes, or None where there is no value."""
    return list(output_node(gm).args[0])  # pyright: ignore[reportArgumentType]


def arguments(node: Node) -> tuple[Any, ...]:
    """A call's positional arguments; torch.fx's own type for them allows everything, and so nothing."""
    return node.args


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def target_name(target: Any) -> str:
    """`aten.mm`, `aten.add.Scalar`, `shardc.all_gather`, `getitem`."""
    if hasattr(target, "overloadpacket"):
        return str(target).removesuffix(".default")
    if target in c.SYMBOLIC:
        return f"shardc.{target.__name__}"
    return getattr(target, "__name__", str(target))


class Unrun(GraphModule):
    """A graph whose code is generated when it is first called or asked for: most copies never are."""

    def recompile(self) -> Any:
        return super().recompile() if "forward" in vars(type(self)) else None

    def forward(self, *args: Any) -> Any:
        GraphModule.recompile(self)  # it gives this object's class the generated forward
        return self.forward(*args)

    @property
    def code(self) -> str:
        if "forward" not in vars(type(self)):
            GraphModule.recompile(self)
        return super().code


def copy_graph(gm: GraphModule) -> GraphModule:
    """An independent graph with the same nodes, names and meta."""
    graph = Graph()
    env: dict[Any, Any] = {}
    returned = graph.graph_copy(gm.graph, env)
    graph.output(returned)
    for old, new in env.items():
        new.meta = dict(old.meta)
    return Unrun(gm, graph)
