"""Where each node comes from: the user's line, the module, forward or backward; and errors that say so.

A backward node is at the place of the forward node whose gradient it computes: autograd numbers
both alike (`seq_nr`). What torch leaves unplaced, sums of gradients mostly, inherits from a neighbour.
"""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.node import stays
from shardc.compiler.ir.signature import InputKind, OutputKind, Signature
from shardc.compiler.user_code import is_users

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
EXCERPT_BEFORE, EXCERPT_AFTER = 1, 1


class Source(NamedTuple):
    """A line of the user's code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} in {self.function}"


@lru_cache(maxsize=4096)
def innermost(stack_trace: str) -> Source | None:
    """The innermost line outside torch of a printed stack."""
    found = [Source(m["file"], int(m["line"]), m["function"]) for m in _FRAME.finditer(stack_trace)]
    return next((source for source in reversed(found) if is_users(source.file)), None)


def annotate(graph: Graph, signature: Signature, module: nn.Module) -> None:
    """Sets where, file, line, path, phase, region and custom on every node; torch's own such keys are dropped."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    owners = dict(module.named_modules())
    fqns = {str(id(owner)): fqn for fqn, owner in owners.items()}
    forward = _forward_by_number(nodes)
    sources = {node: _source(node, forward) for node in nodes}
    paths = {node: _path(node, forward, fqns) for node in nodes}
    inherited_paths = _inherit(nodes, paths)
    inherited_sources = _inherit(nodes, sources)
    backward = _backward(graph, signature)
    for node in nodes:
        path = inherited_paths[node] or ""
        source = inherited_sources[node] or _definition(owners[path])
        custom = node.meta.get("custom") or _origin(node, forward).meta.get("custom")
        node.meta = {
            "val": node.meta["val"],
            "where": str(source),
            "file": source.file,
            "line": source.line,
            "path": path,
            "phase": "backward" if node in backward else "forward",
            "region": _region(node),
        } | {key: value for key, value in (("custom", custom), ("data", node.meta.get("data"))) if value}
    for node, entry in zip(graph.nodes, signature.inputs, strict=False):
        held = entry.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        node.meta["path"] = entry.name.rpartition(".")[0] if held else ""
        node.meta["phase"] = "backward" if entry.kind is InputKind.TANGENT else "forward"


def _region(node: Node) -> str:
    """Which of torch's checkpoints computes a node again in backward; "" for none."""
    again = "RECOMPUTE" in getattr(node.meta.get("recompute"), "name", "")
    return f"checkpoint {node.meta.get('ac_graph_id', '')}" if again else ""


def _forward_by_number(nodes: Iterable[Node]) -> dict[int, Node]:
    """The first forward node of each sequence number: the one that made the autograd node."""
    first: dict[int, Node] = {}
    for node in nodes:
        if "seq_nr" in node.meta and node.meta.get("partitioner_tag") != "is_backward":
            first.setdefault(node.meta["seq_nr"], node)
    return first


def _origin(node: Node, forward: Mapping[int, Node]) -> Node:
    """The forward node that a backward node belongs to; any other node itself."""
    summed = node.meta.get("is_gradient_acc")
    if node.meta.get("partitioner_tag") != "is_backward" or summed:
        return node
    return forward.get(node.meta.get("seq_nr", -1), node)


def _source(node: Node, forward: Mapping[int, Node]) -> Source | None:
    for candidate in (_origin(node, forward), node):
        source = innermost(candidate.meta.get("stack_trace") or "")
        if source:
            return source
    return None


def _path(node: Node, forward: Mapping[int, Node], fqns: Mapping[str, str]) -> str | None:
    for candidate in (_origin(node, forward), node):
        for key in ("nn_module_stack", "fwd_nn_module_stack"):
            # A module called again appears under its id with the number of the call behind it.
            owners = [fqns.get(str(owner).partition("@")[0]) for owner in candidate.meta.get(key) or {}]
            known = [fqn for fqn in owners if fqn is not None]
            if known:
                return known[-1]
    return None


def _inherit(nodes: list[Node], found: Mapping[Node, Any]) -> dict[Node, Any]:
    """What is found, and for the rest what an operand has, else what a user has."""
    out = dict(found)
    for order, neighbours in ((nodes, _operands), (nodes[::-1], _users)):
        for node in order:
            if out[node] is None:
                out[node] = next((out[n] for n in neighbours(node) if out.get(n) is not None), None)
    return out


def _operands(node: Node) -> list[Node]:
    """The latest first: a sum of gradients belongs where its last summand comes from, not where the sum began."""
    return sorted(node.all_input_nodes, reverse=True)


def _users(node: Node) -> list[Node]:
    return list(node.users)


def _definition(module: nn.Module) -> Source:
    """Where the forward of a module's class is written: all there is for a torch.nn module by itself."""
    owner = type(module)
    scripted = isinstance(module, torch.jit.ScriptModule)
    code = None if scripted else getattr(inspect.unwrap(owner.forward), "__code__", None)
    if code is None:
        return Source("<unknown>", 0, getattr(module, "original_name", owner.__name__))
    return Source(code.co_filename, code.co_firstlineno, code.co_name)


def _backward(graph: Graph, signature: Signature) -> set[Node]:
    """Nodes that depend on a tangent, or that only gradients need. What forward drew it draws, though unused."""
    nodes = list(graph.nodes)
    late = {n for n, i in zip(nodes, signature.inputs, strict=False) if i.kind is InputKind.TANGENT}
    results = nodes[-1].args[0]
    needed = {r for r, o in zip(results, signature.outputs, strict=True) if o.kind is not OutputKind.GRADIENT}
    for node in reversed(nodes[:-1]):
        early = node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward"
        if node in needed or (early and stays(node)):
            needed.add(node)
            needed.update(node.all_input_nodes)
    for node in nodes:
        if any(operand in late for operand in node.all_input_nodes):
            late.add(node)
    return late | {node for node in nodes if node not in needed}


class DependsOnValues(ShardingError):
    """Forward looks at what a tensor holds."""


VALUE_HELP = (
    "compute both sides and choose with torch.where, or move the branch out of forward; "
    "a size must be a Python number, not read from a tensor"
)
ROOM, IN_PLACE_OF_TORCH = str(Path(__file__).parent), "rewrites.py"
PASSING_ON = ("__torch_function__", "__torch_dispatch__")  # call what forward calls
CAPTURE_HELP = "if it runs without compiling, move what torch cannot trace out of forward, or out of the module"
FLEX = (
    "forward uses flex_attention or makes a block mask, which cannot be traced here",
    "write it with scaled_dot_product_attention and a mask",
)
# Of torch's own errors, by what they say or where they come from, those that say nothing of the user's mistake.
KNOWN = (
    (
        "Cannot backprop through mirrored meta",
        "forward calls backward() or torch.autograd.grad itself",
        "return the loss, and call backward() on what the compiled module returns (train_step does both); "
        "a derivative inside of forward is torch.func.grad's or vjp's",
    ),
    (
        "torch/distributions/distribution.py",
        "a distribution looks at the values of its parameters, which are not known when tracing",
        "pass validate_args=False to it, or torch.distributions.Distribution.set_default_validate_args(False)",
    ),
    (
        "torch/nn/utils/rnn.py",
        "forward packs sequences, whose sizes are what a tensor holds",
        "pass padded sequences to the layer, and mask what is behind their ends",
    ),
    ("pop from empty mode stack", *FLEX),
    ("FlexAttention does not support backward", *FLEX),
)
_DATA_DEPENDENT = (
    "data-dependent",
    "DataDependent",
    "GuardOnDataDependentSymNode",
    "DynamicOutputShape",
    "Tensor.item",
    "_local_scalar_dense",
)


def depends_on_values(error: BaseException) -> bool:
    """Whether tracing failed because forward looks at what a tensor holds."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in _DATA_DEPENDENT)


def refusal(error: BaseException) -> ShardingError:
    """The error for the user: what could not be traced, at which of their lines, and what to do."""
    stack = getattr(error, "real_stack", None) or ()
    source = next((s for s in map(_of_frame, reversed(list(stack))) if s), None)
    source = source or innermost(str(error)) or _of_traceback(error)
    place = {"where": str(source or ""), "excerpt": excerpt(source)}
    by_values = depends_on_values(error) or "FunctionalTensor" in str(error)
    frames = (*stack, *traceback.extract_tb(error.__traceback__)) if by_values else ()
    for sign, what, help in KNOWN:
        if sign in str(error) or any(frame.filename.endswith(sign) for frame in frames):
            return ShardingError(what, **place, help=help)
    if depends_on_values(error):
        what = "forward depends on the value of a tensor, which is not known when tracing"
        return DependsOnValues(what, **place, help=VALUE_HELP)
    by_torch = type(error).__module__.startswith("torch")
    verb = "cannot be traced" if by_torch else f"raises {type(error).__name__}"
    return ShardingError(f"forward {verb}: {headline(error)}", **place, help=CAPTURE_HELP)


def is_fault(error: BaseException) -> bool:
    """Whether it was this room that raised an error, not forward nor what forward calls."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name not in PASSING_ON]
    return bool(frames) and frames[-1].filename.startswith(ROOM) and not frames[-1].filename.endswith(IN_PLACE_OF_TORCH)


def refusal_at(node: Node, what: str, help: str, kind: type[ShardingError] = ShardingError) -> ShardingError:
    """The same for a node of torch's graph."""
    return _refusal_in(node.meta.get("stack_trace"), what, help, kind)


def refused_at(stack_trace: str | None, error: ShardingError) -> ShardingError:
    """The same error, at the user's line."""
    return _refusal_in(stack_trace, error.what, error.help, type(error))


def writes_to_constant(stack_trace: str | None) -> ShardingError:
    return _refusal_in(
        stack_trace,
        "forward changes a tensor in place that is no parameter, buffer or input",
        "register it as a buffer",
    )


COMMUNICATION = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")  # namespaces of operators


def communicates(stack_trace: str | None, name: str) -> ShardingError:
    """For a collective of the user's own: what it would be called on is one device's, not a rank's."""
    return _refusal_in(
        stack_trace,
        f"forward calls the collective {name} itself",
        "the program is written for the global batch: leave the collective out, and write the sum over the batch "
        "(x.sum(0), x.mean()); shardc.constrain fixes a layout",
    )


def sparse(who: str, layout: Any) -> ShardingError:
    """For a tensor of which no layout tells what ranks hold; who: that, and whether it is or gives it."""
    source = innermost("".join(traceback.format_stack()))
    return ShardingError(
        f"{who} a {str(layout).removeprefix('torch.')} tensor",
        where=str(source or ""),
        excerpt=excerpt(source),
        help="use a dense one, or index_select and index_add by the places of its entries",
    )


def without_data(stack_trace: str | None) -> ShardingError:
    return _refusal_in(
        stack_trace,
        "forward uses a tensor on meta that is no parameter or buffer",
        "register it as a buffer, so that it is initialised",
    )


def _refusal_in(
    stack_trace: str | None, what: str, help: str, kind: type[ShardingError] = ShardingError
) -> ShardingError:
    source = innermost(stack_trace or "")
    return kind(what, where=str(source or ""), excerpt=excerpt(source), help=help)


def headline(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _of_frame(frame: traceback.FrameSummary) -> Source | None:
    if not is_users(frame.filename):
        return None
    return Source(frame.filename, frame.lineno or 0, frame.name)


def _of_traceback(error: BaseException) -> Source | None:
    frames = traceback.extract_tb(error.__traceback__)
    return next((s for s in map(_of_frame, reversed(frames)) if s), None)


def excerpt(source: Source | None) -> str:
    """The line with its neighbours, the guilty one marked."""
    if source is None:
        return ""
    lines = range(max(1, source.line - EXCERPT_BEFORE), source.line + EXCERPT_AFTER + 1)
    shown = [(n, linecache.getline(source.file, n).rstrip()) for n in lines]
    return "\n".join(f"{'>' if n == source.line else ' '} {text}" for n, text in shown if text)
