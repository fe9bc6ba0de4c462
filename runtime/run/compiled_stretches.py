"""What a rank computes between its collectives, compiled: `backend="inductor"`, or any other that torch.compile takes.

    %mm = torch.mm(%x, %w)
    %gelu = torch.nn.functional.gelu(%mm)
    %all_reduce = AllReduce(...)(%gelu)          %stretch_0 = torch.compile(mm, gelu)(%x, %w)
    %relu = torch.relu(%all_reduce)         ==>  %all_reduce = AllReduce(...)(%stretch_0)
                                                 %stretch_1 = torch.compile(relu)(%all_reduce)

Collectives, their starts and waits, random draws of torch's own, and what has sizes that data decides stay where they
are, so every rank still issues them in one order. Stretches of equal text on values of equal kinds, as repeated layers
have them, are compiled once. Sizes are fixed, so what torch.compile makes is not guarded: the program's own key has
compared them.

All are compiled before the first step, and the ranks of a machine share the work: each begins with other ones, and what
one has compiled the others find in inductor's own cache.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from shardc.compiler.ir.node import is_random, of
from shardc.compiler.ir.rewrite import inherit
from shardc.compiler.ir.views import Kind
from shardc.compiler.rules.facts import is_view
from shardc.runtime.run.bind import KEPT, piece
from shardc.runtime.run.direct_calls import DIRECT

log = logging.getLogger(__name__)

Backend = str | Callable[..., Any]
DIRECTLY = {id(fn): op for op, fn in DIRECT.items()}


class Stretches:
    """The compiled stretches of one program; its halves share them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[str, _Compiled] = {}
        self._calls: list[tuple[_Compiled, list[Node]]] = []  # each with what it is called on

    def compiled(self, gm: GraphModule) -> GraphModule:
        """A bound program of one rank with each stretch of computation as one call."""
        graph, env = Graph(), dict[Node, Node]()
        stretch: list[Node] = []
        for node in gm.graph.nodes:
            if _computes(node, stretch):
                stretch.append(node)
                continue
            self._close(stretch, graph, env)
            stretch = []
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.lint()
        return GraphModule(gm, graph, class_name="RankProgram")

    def compile_all(self, kinds: Mapping[str, Kind]) -> None:
        """Compile for what each stretch will be called on, by name; what is not told is compiled when it is called."""
        calls = [(stretch, [n.name for n in given]) for stretch, given in self._calls if stretch.is_pure]
        told = [(stretch, tuple(map(kinds.__getitem__, names))) for stretch, names in calls if kinds.keys() >= {*names}]
        wanted = sorted(dict.fromkeys(told), key=lambda item: -item[0].length)
        index, count = _place_on_host()
        for i in range(count):  # this rank's share, then what the others may have compiled by then
            for stretch, xs in wanted[(index + i) % count :: count]:
                stretch.compile_for(xs)

    def _close(self, nodes: Sequence[Node], graph: Graph, env: dict[Node, Node]) -> None:
        """One call in place of these nodes."""
        if all(_only_shows(node) for node in nodes):
            for node in nodes:
                env[node] = graph.node_copy(node, env.__getitem__)
            return
        inside = {*nodes}
        given = [n for n in dict.fromkeys(n for node in nodes for n in node.all_input_nodes) if n not in inside]
        results = [n for n in nodes if any(user not in inside for user in n.users)]
        if not results:
            return
        stretch = self._of(nodes, given, results)
        self._calls.append((stretch, given))
        call = graph.call_function(stretch, tuple(env[n] for n in given))
        inherit(call, nodes[0], ("where", "path", "phase"))
        for i, node in enumerate(results):
            env[node] = graph.call_function(operator.getitem, (call, i))
            inherit(env[node], node, KEPT)

    def _of(self, nodes: Sequence[Node], given: Sequence[Node], results: Sequence[Node]) -> _Compiled:
        graph, env = Graph(), dict[Node, Node]()
        for i, node in enumerate(given):
            env[node] = graph.placeholder(f"x{i}")
        for i, node in enumerate(nodes):
            target, args, kwargs = node.target, node.args, node.kwargs
            lifted = map_arg((args, kwargs), env.__getitem__)
            env[node] = graph.create_node("call_function", target, *lifted, name=f"v{i}")  # pyright: ignore
        graph.output(tuple(env[n] for n in results))
        gm = GraphModule(nn.Module(), graph)
        return self._known.setdefault(gm.code, _Compiled(gm, self._backend))


class _Compiled:
    """Compiles when called with values of another kind than before."""

    def __init__(self, gm: GraphModule, backend: Backend) -> None:
        self.__name__ = "stretch"  # generated code names its globals after this
        self._gm, self._backend = gm, backend
        self._made: dict[Any, Callable[..., Any]] = {}
        self.length = len(gm.graph.nodes)
        self.is_pure = not any(_is_users(node.target) for node in gm.graph.nodes)

    def __call__(self, *xs: Any) -> Any:
        key = tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in xs)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._compile()
        return made(*xs)

    def compile_for(self, kinds: Sequence[Kind]) -> None:
        """Compile for tensors of these kinds, by a call on zeros: torch.compile has no other way."""
        zeros = [_zeros(kind) for kind in kinds]
        try:
            with torch.no_grad():
                self(*zeros)
        except Exception as error:
            # Real values may have what zeros lack (an inverse). If they do not, their own call says so, and where.
            log.info("a stretch is compiled when it is first called: on zeros it fails with %s", error)

    def _compile(self) -> Callable[..., Any]:
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        # Code of its own for each kind of values: what is not guarded must not be found by another one.
        own = GraphModule(nn.Module(), self._gm.graph)
        return torch.compile(own.forward, backend=self._backend, dynamic=False, fullgraph=True, options=options)


def _zeros(kind: Kind) -> Tensor:
    """Zeros that lie in memory so; where a value is expanded, many in one place."""
    last = sum((n - 1) * step for n, step in zip(kind.shape, kind.stride, strict=True))
    room = torch.zeros(0 if 0 in kind.shape else last + 1, dtype=kind.dtype, device=kind.device)
    return room.as_strided(kind.shape, kind.stride)


def _place_on_host() -> tuple[int, int]:
    """(this rank's number, how many there are) on its machine, as torchrun tells; else among all."""
    rank, count = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    if rank is not None and count is not None:
        return int(rank), int(count)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _computes(node: Node, stretch: Sequence[Node]) -> bool:
    """Whether a node may be compiled together with those of a stretch before it."""
    if node.op != "call_function" or is_random(node) or of(node).data:
        return False
    if node.target is operator.getitem:
        return node.args[0] in stretch  # results of a collective are taken apart outside
    return isinstance(node.target, torch._ops.OpOverload) or node.target is piece or id(node.target) in DIRECTLY


def _is_users(target: Any) -> bool:
    """Whether an operator is neither torch's nor ours: only its author knows what one call more would do."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims", "shardc")


def _only_shows(node: Node) -> bool:
    """Whether a call does no work that could be compiled."""
    op = DIRECTLY.get(id(node.target), node.target)
    return op is operator.getitem or is_view(op)
