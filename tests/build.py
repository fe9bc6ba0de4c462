"""Graphs for tests, from small Python functions with typed inputs and explicit operator calls.

    def row_parallel(x, w):
        return all_reduce(aten.mm(x, w), "tp")

    gm = build(row_parallel, Mesh(dp=2, tp=4), Stage.RESHARDED, x="f32[8@dp, 32@tp]", w="f32[32@tp, 16]")

Types are written as `Spec.text` prints them. A parameter named `tangent...` is an input of backward, and so
is all that is made from it; everything else is forward.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from shardc.compiler.infer.decisions import decide_node
from shardc.compiler.ir import collectives
from shardc.compiler.ir.graph import placeholders, returned
from shardc.compiler.ir.node import arguments, operands, set_specs, spec, specs, tensors, val
from shardc.compiler.ir.signature import Input, InputKind, Output, OutputKind, Signature
from shardc.compiler.pipeline.runner import Context, Record, Runner
from shardc.compiler.pipeline.stages import Stage, verify
from shardc.compiler.plan.call_layouts import CallLayouts
from shardc.compiler.plan.param_layout import ParamLayout
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.rules.ops import all_rules as _rules  # noqa: F401  fills the rule table
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import DTYPES, Part, Spec, axes_of, canonical
from shardc.passes.local.localize import Localize
from shardc.runtime.run.simulate import simulate
from shardc.runtime.shards import cut, join

NAMED = {name: dtype for dtype, name in DTYPES.items()}
TYPE = re.compile(r"(\w*)\[(.*)\]((?:\+\w+(?:\(\w+\))?)*)")


def parse(text: str, mesh: Mesh) -> tuple[torch.dtype | None, Spec]:
    """What `Spec.text` printed, read again. Raises ValueError for anything else."""
    match = TYPE.fullmatch(text)
    if match is None:
        raise ValueError(f"no type: {text!r}")
    name, dims, tail = match.groups()
    dtype = (NAMED.get(name) or getattr(torch, name)) if name else None
    pending = {}
    for op, axis in re.findall(r"\+(\w+)(?:\((\w+)\))?", tail):
        pending[axis or op] = op if axis else "sum"
    parts = [_dim(d) for d in dims.split(", ") if d]
    unknown = [a for a in (*(a for dim in parts for a in axes_of(dim)), *pending) if a not in mesh]
    if unknown:
        raise ValueError(f"{text!r}: no mesh dim {unknown[0]}")
    layout = Spec(tuple(canonical(dim, mesh) for dim in parts))
    return dtype, layout.with_pending(pending, mesh)


def _dim(text: str) -> tuple[Part, ...]:
    parts = []
    for word in text.strip("()").split():
        size, _, axes = word.partition("@")
        parts.append(Part(int(size), tuple(axes.split(".")) if axes else ()))
    return tuple(parts)


class _Tracer(GraphAppendingTracer):
    """Names nodes as traced programs do, lets specs be arguments, and describes each node as it is made."""

    def __init__(self, graph: Graph, mesh: Mesh, stage: Stage) -> None:
        super().__init__(graph)
        self.mesh, self._stage = mesh, stage

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Node:
        if isinstance(target, torch._ops.OpOverloadPacket):  # `aten.add(x, y)` is what it would be on tensors
            values, named = map_arg((args, kwargs), val)
            chosen = torch._C._jit_resolve_packet(target._qualified_op_name, *values, **named)
            target = getattr(target, chosen or "default")
        if isinstance(target, torch._ops.OpOverload):
            name = target.overloadpacket.__name__
        node = super().create_node(kind, target, args, kwargs, name or target.__name__, type_expr)
        _describe(node, self.mesh, self._stage)
        return node

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, Spec) else super().create_arg(a)


def _recorded(fn: Callable) -> Callable:
    def call(x: Proxy, *args: Any) -> Any:
        return x.tracer.create_proxy("call_function", fn, (x, *args), {}, name=fn.__name__)

    return call


all_gather = _recorded(collectives.all_gather)
all_reduce = _recorded(collectives.all_reduce)
reduce_scatter = _recorded(collectives.reduce_scatter)
all_to_all = _recorded(collectives.all_to_all)
local_slice = _recorded(collectives.local_slice)
make_partial = _recorded(collectives.make_partial)


def reshard(x: Proxy, to: str) -> Any:
    """A reshard node to the layout that the type says."""
    target = parse(to, x.tracer.mesh)[1]  # pyright: ignore[reportAttributeAccessIssue]
    return x.tracer.create_proxy("call_function", collectives.reshard, (x, target), {}, name="reshard")


def build(fn: Callable, mesh: Mesh, stage: Stage = Stage.TRACED, /, **types: str) -> GraphModule:
    """The graph of `fn`, called with one proxy per typed input; from SHARDED on, every node has its layout."""
    graph = Graph()
    tracer = _Tracer(graph, mesh, stage)
    inputs = {}
    with FakeTensorMode():
        for name in inspect.signature(fn).parameters:
            dtype, layout = parse(types[name], mesh)
            node = graph.placeholder(name)
            node.meta = {"val": torch.empty(layout.shape, dtype=dtype), "spec": layout, "phase": _phase(node)}
            inputs[name] = Proxy(node, tracer)
        result = fn(**inputs)
        graph.output(tracer.create_arg(result if isinstance(result, tuple) else (result,)))
    return GraphModule({}, graph)


def _phase(node: Node) -> str:
    late = node.name.startswith("tangent") or any(n.meta["phase"] == "backward" for n in node.all_input_nodes)
    return "backward" if late else "forward"


def _describe(node: Node, mesh: Mesh, stage: Stage) -> None:
    """Give a call its value, its phase and, if the stage has layouts, its layout."""
    args, kwargs = map_arg((node.args, node.kwargs), val)
    value = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    node.meta = {"val": value, "phase": _phase(node)}
    if stage < Stage.SHARDED:
        return
    if node.target is operator.getitem:
        source, index = node.args
        node.meta["spec"] = specs(source)[len(tensors_in(list(source.meta["val"])[:index]))]  # pyright: ignore
    elif getattr(node.target, "__module__", "") == collectives.__name__:
        node.meta["spec"] = moved(node, mesh)
    else:
        decision = decide_node(node, [spec(n) for n in operands(node)], mesh)
        node.meta["wants"] = decision.operands
        set_specs(node, decision.results)


def moved(node: Node, mesh: Mesh) -> Spec:
    """The layout a symbolic collective gives, split plainly where it splits."""
    source, *args = arguments(node)
    before = spec(source)
    match node.target.__name__:  # pyright: ignore[reportAttributeAccessIssue]
        case "reshard":
            return args[0]
        case "all_gather":
            return before.without(args[1], mesh)
        case "all_reduce":
            return before.without(args[0], mesh)
        case "reduce_scatter" | "local_slice":
            return before.without(args[1], mesh).split(args[0], args[1], mesh)
        case "all_to_all":
            return before.without(args[2], mesh).split(args[1], args[2], mesh)
        case "make_partial":
            return before.with_pending({**dict(before.pending), args[0]: "sum"}, mesh)
    raise AssertionError(node.target)


def context(gm: GraphModule, mesh: Mesh, gradients: Sequence[str] = (), **plan: Any) -> Context:
    """A context in which the graph's last outputs are the gradients of the named inputs.

    plan: fields of `Resolved`, such as data_axes or bucket_bytes, or of `Context`. Without `params`, the inputs
    that have gradients are parameters, stored whole. Inputs named `tangent...` are the tangents of the first
    output, `tangent1` is that of the second, one named `carry_w` is the gradient of w that was kept back.
    """
    nodes, ends = placeholders(gm), returned(gm)
    params = plan.pop("params", None)
    if params is None:
        params = {n.name: param(n, mesh) for n in nodes if n.name in gradients}
    inputs = [_input(node.name, params) for node in nodes]
    order = [n.name for n in nodes]
    results = len(ends) - len(gradients)
    outputs = [Output(str(n), OutputKind.OUTPUT, f"[{i}]", requires_grad=True) for i, n in enumerate(ends[:results])]
    outputs += [Output(None, OutputKind.GRADIENT, name, of=order.index(name)) for name in gradients]
    plan.setdefault("data_axes", ())
    calls = CallLayouts(plan.pop("inputs", None), plan.pop("outputs", None), lambda x: x, mesh.names)
    fields: dict[str, Any] = dict(
        mesh=mesh, params=params, buffers={}, borders=(), positional={}, counts={},
        bucket_bytes={}, reduce_dtype={}, calls=calls,
    )  # fmt: skip
    options = {k: plan.pop(k) for k in ("keep", "strict", "carries") if k in plan}
    signature = Signature(tuple(inputs), tuple(outputs), None, None, (), 0, (), {})
    return Context(mesh, Resolved(**fields | plan), signature, **options)


def _input(name: str, params: Any) -> Input:
    if name.startswith("tangent"):
        number = name.removeprefix("tangent")
        return Input(name, InputKind.TANGENT, name, of=int(number) if number.isdigit() else 0)
    if name.startswith("carry_"):
        return Input(name, InputKind.CARRY, name.removeprefix("carry_"))
    return Input(name, InputKind.PARAMETER if name in params else InputKind.BATCH, name, requires_grad=True)


def param(
    node: Node, mesh: Mesh, stored: str = "", compute: str = "", kept: str = "", open: Sequence[str] = (), **more: Any
) -> ParamLayout:
    """The layout of a parameter: by default whole, computed with as it is stored, and kept as it is computed with."""
    (x,) = tensors(node)
    whole = Spec.whole(x.shape).text()
    stored = stored or whole
    rest, used, between = (parse(text, mesh)[1] for text in (stored, compute or stored, kept or compute or stored))
    return ParamLayout(node.name, x.dtype, True, rest, used, between, frozenset(open), **more)


def apply(step: Any, gm: GraphModule, ctx: Context) -> Record:
    """Run one pass on a graph of the stage that it takes; the graph is verified before and after."""
    verify(gm, step.takes, ctx.mesh)
    return Runner(gm, ctx, {}, step.takes).run(step)


def local(fn: Callable, mesh: Mesh, /, **types: str) -> GraphModule:
    """The graph of `fn`, whose layouts agree, made local."""
    gm = build(fn, mesh, Stage.RESHARDED, **types)
    apply(Localize(), gm, context(gm, mesh))
    return gm


def random_inputs(gm: GraphModule) -> list[Tensor]:
    """A global tensor per placeholder; small integers, so that sums are the same in any order."""
    out = []
    for node in placeholders(gm):
        (fake,) = tensors(node)
        out.append(torch.randint(-4, 5, tuple(fake.shape)).to(fake.dtype))
    return out


def on_one_device(gm: GraphModule, inputs: Sequence[Tensor]) -> list[Any]:
    """The graph at global shapes: every collective is an identity."""
    return list(Interpreter(gm).run(*inputs))


def simulated(gm: GraphModule, mesh: Mesh, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Global outputs of a LOCAL graph that runs on all ranks, from global inputs; copies must agree."""
    coords = [mesh.coords(rank) for rank in range(mesh.size)]
    pieces = [[cut(x, spec(n), mesh, at) for at in coords] for x, n in zip(inputs, placeholders(gm), strict=True)]
    ends = returned(gm)
    found = simulate(gm, mesh, pieces)
    out = [join(p, spec(n), mesh) for p, n in zip(found, ends, strict=True)]
    for whole, pieces, node in zip(out, found, ends, strict=True):
        for piece, at in zip(pieces, coords, strict=True):
            assert tuple(piece.shape) == spec(node).local_shape(mesh, at), f"%{node} at {at}"
            if not spec(node).pending:
                assert torch.equal(piece, cut(whole, spec(node), mesh, at)), f"%{node} differs at {at}"
    return out
