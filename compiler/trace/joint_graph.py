"""From torch's joint graph to ours: plain placeholders, aten calls, one flat output, and its Signature.

Taken out: the copies at the border (see trace_capture.py), `detach` and the like, which mean nothing once
the backward is in the graph, and whatever no output needs, asserts and profiler marks among it; random
operators stay, as they advance the generator. Constants that tracing met become inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.node import stays
from shardc.compiler.ir.signature import Input, InputKind, Leaf, Output, OutputKind, Signature
from shardc.compiler.rules.facts import ASSERT
from shardc.compiler.trace.capture import Program
from shardc.compiler.trace.module.results import SIMPLE
from shardc.compiler.trace.sizes.data_decided import Settled, decides, is_needed, with_checks
from shardc.compiler.trace.sizes.symbolic import SYMBOLIC, Sized, depends_on_data, symbols_of
from shardc.compiler.trace.sources import COMMUNICATION, VALUE_HELP, DependsOnValues, communicates, refusal_at
from shardc.compiler.trace.torch_internals import Gradient, Primal, Result, Tangent, is_higher_order

aten = torch.ops.aten
IDENTITIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)


@dataclass(frozen=True)
class Argument:
    """One tensor that goes in: a parameter, a buffer or a tensor among forward's arguments."""

    kind: InputKind
    name: str
    requires_grad: bool


@dataclass
class Joint:
    """torch's graph, read: nodes by the position of what they are, and what each copy stands for."""

    gm: GraphModule
    nodes: list[Node]
    primals: dict[int, Node]
    tangents: dict[int, Node]  # by tensor output
    data: bool = False  # whether data may decide sizes and numbers
    results: dict[int, Any] = field(default_factory=dict)  # tensor outputs, then mutations
    gradients: dict[int, Any] = field(default_factory=dict)  # by primal
    stands_for: dict[Node, Node] = field(default_factory=dict)

    @classmethod
    def read(cls, gm: GraphModule, data: bool = False) -> Joint:
        nodes = list(gm.graph.nodes)
        primals, tangents = {}, {}
        for node in nodes:
            match node.op, node.meta.get("desc"):
                case "placeholder", Primal(idx=idx):
                    primals[idx] = node
                case "placeholder", Tangent(output=Result(idx=idx)):
                    tangents[idx] = node
                case "placeholder", other:
                    raise ShardingError(f"tracing made an input that has no place in a program: {other}")
        joint = cls(gm, nodes, primals, tangents, data)
        joint._see_through_copies()
        joint._read_outputs()
        return joint

    def resolve(self, node: Node) -> Node:
        return self.stands_for.get(node, node)

    def _see_through_copies(self) -> None:
        entering = {*self.primals.values(), *(n for n in self.nodes if n.op == "get_attr")}
        for node in self.nodes:
            operands = node.all_input_nodes
            copied = node.target is aten.clone.default and operands[0] in entering
            if copied or node.target in IDENTITIES:
                self.stands_for[node] = self.resolve(operands[0])
            elif _overwrites(node):
                self.stands_for[node] = self.resolve(operands[1])

    def _read_outputs(self) -> None:
        output = self.nodes[-1]
        values: Any = output.args[0]
        for value, desc in zip(values, output.meta["desc"], strict=True):
            match desc:
                case Result(idx=idx):
                    self.results[idx] = self.resolve(value.args[0])  # every result is a copy
                case Gradient(grad_of=Primal(idx=idx)):
                    self.gradients[idx] = value if value is None else self.resolve(value)

    def needed(self) -> set[Node]:
        """What the outputs are computed from, and random operators with what they need."""
        ends = [*self.results.values(), *self.gradients.values()]
        needed = {node for node in ends if node is not None}
        for node in reversed(self.nodes):
            lasts = self.data and is_needed(node) if node.target is ASSERT else stays(node)
            if node in needed or (lasts and node not in self.stands_for):
                needed.add(node)
                needed.update(self.resolve(operand) for operand in node.all_input_nodes)
        return needed - {self.nodes[-1]}


@dataclass
class Builder:
    """Our graph while it grows; `of` maps torch's nodes to ours, `position` flat arguments to inputs."""

    joint: Joint
    graph: Graph = field(default_factory=Graph)
    of: dict[Node, Any] = field(default_factory=dict)  # a node, or the number it stands for
    inputs: list[Input] = field(default_factory=list)
    position: dict[int, int] = field(default_factory=dict)

    def placeholder(self, old: Node, kind: InputKind, name: str, called: str, **more: Any) -> None:
        new = self.graph.placeholder(re.sub(r"\W+", "_", called).rstrip("_"))
        new.target = new.name
        new.meta = {k: old.meta[k] for k in ("val",)}
        self.of[old] = new
        self.inputs.append(Input(new.name, kind, name, **more))

    def arguments(self, arguments: Sequence[Argument], *kinds: InputKind) -> None:
        for i, argument in enumerate(arguments):
            if argument.kind in kinds:
                self.position[i] = len(self.inputs)
                name, grad = argument.name, argument.requires_grad
                self.placeholder(self.joint.primals[i], argument.kind, name, name, requires_grad=grad)

    def constants(self, needed: set[Node], names: Mapping[int, str]) -> None:
        """Each tensor that tracing met by itself, once, however often it is used."""
        placed: dict[int, Node] = {}
        for old in self.joint.nodes:
            if old.op != "get_attr" or old not in needed:
                continue
            value = getattr(self.joint.gm, str(old.target))
            if id(value) in placed:
                self.of[old] = self.of[placed[id(value)]]
                continue
            name = names.get(id(value), f"constant{len(placed)}")
            _check_constant(old, name, value)
            placed[id(value)] = old
            self.placeholder(old, InputKind.CONSTANT, name, name, value=value)

    def calls(self, needed: set[Node]) -> None:
        for old in self.joint.nodes:
            if old.op != "call_function" or old not in needed or old in self.stands_for:
                continue
            if isinstance(old.meta.get("val"), SYMBOLIC) and not self.joint.data:
                self.of[old] = Sized.of(old.meta["val"])
                continue
            args, kwargs = torch.fx.map_arg((old.args, old.kwargs), lambda n: self.of[self.joint.resolve(n)])
            packet: Any = getattr(old.target, "overloadpacket", old.target)
            new = self.graph.create_node("call_function", old.target, args, kwargs, name=packet.__name__)
            new.meta = dict(old.meta)
            self.of[old] = new

    @property
    def stands_for(self) -> dict[Node, Node]:
        return self.joint.stands_for


def build(
    gm: GraphModule,
    program: Program,
    arguments: Sequence[Argument],
    leaves: Sequence[Leaf],
    constants: Mapping[int, str],
    about: Mapping[str, Any],
    data: bool = False,
) -> tuple[GraphModule, Signature]:
    """Our graph and its signature.

    `arguments` are the flat inputs of `program`; `leaves` name the argument they are by its position
    there; `constants` gives names by `id` of the tensor; `about` holds the signature's other fields. data: whether data
    may decide sizes and numbers, which is no template's.
    """
    _check_results(program)
    joint = Joint.read(gm)
    needed = joint.needed()
    _refuse_unsupported(joint, needed, data)
    data = data and decides(joint.nodes, needed)
    if data:
        joint = Joint.read(with_checks(gm), data)
        needed = joint.needed()
    ours = Builder(joint)
    ours.arguments(arguments, InputKind.PARAMETER, InputKind.BUFFER)
    ours.constants(needed, constants)
    ours.arguments(arguments, InputKind.BATCH)
    outputs = _outputs(joint, program, arguments, ours.position)
    for number, at in enumerate(program.tensors):
        if number in joint.tangents:
            name = outputs[at].name
            ours.placeholder(joint.tangents[number], InputKind.TANGENT, name, f"tangent_{at}", of=at)
    ours.calls(needed)
    ends = _ends(joint, program, outputs, ours.position)
    nodes = [None if end is None else ours.of[end] for end in ends]
    ours.graph.output(tuple(nodes))
    named = [replace(output, node=node and node.name) for output, node in zip(outputs, nodes, strict=True)]
    if data:
        Settled(ours.graph, {i.node: named[i.of].node for i in ours.inputs if i.of is not None})
    placed = [Leaf(x.name, None if x.input is None else ours.position[x.input], x.constant) for x in leaves]
    signature = Signature(tuple(ours.inputs), tuple(named), out_spec=program.out_spec, leaves=tuple(placed), **about)
    return GraphModule(torch.nn.Module(), ours.graph), signature


def _outputs(
    joint: Joint, program: Program, arguments: Sequence[Argument], position: Mapping[int, int]
) -> list[Output]:
    """The entries of our output tuple, their nodes left out: results, mutations, gradients."""
    number = {at: i for i, at in enumerate(program.tensors)}
    out = [
        Output(None, OutputKind.OUTPUT, name, constant=leaf, requires_grad=number.get(at) in joint.tangents)
        for at, (name, leaf) in enumerate(zip(program.names, program.leaves, strict=True))
    ]
    out = [replace(o, number=program.numbers.get(at, ""), same=program.same.get(at)) for at, o in enumerate(out)]
    for i in program.mutated:
        out.append(Output(None, OutputKind.MUTATION, arguments[i].name, of=position[i]))
    if joint.tangents:
        for i, argument in enumerate(arguments):
            if argument.requires_grad:
                out.append(Output(None, OutputKind.GRADIENT, argument.name, of=position[i]))
    return out


def _ends(joint: Joint, program: Program, outputs: Sequence[Output], position: Mapping[int, int]) -> list[Node | None]:
    """torch's node of each entry, None where it has none."""
    number = {at: i for i, at in enumerate(program.tensors)}
    primal = {at: i for i, at in position.items()}
    mutation = iter(range(len(program.tensors), len(joint.results)))
    ends: list[Node | None] = []
    for at, output in enumerate(outputs):
        match output.kind:
            case OutputKind.OUTPUT:
                ends.append(joint.results[number[at]] if at in number else None)
            case OutputKind.MUTATION:
                ends.append(joint.results[next(mutation)])
            case OutputKind.GRADIENT:
                ends.append(joint.gradients[primal[output.of or 0]])
    return ends


def _overwrites(node: Node) -> bool:
    """Whether a node is the functional form of `x.copy_(y)` that changes nothing about y."""
    if node.target is not aten.copy.default or len(node.all_input_nodes) < 2:
        return False
    old, new = (operand.meta["val"] for operand in node.all_input_nodes)
    forms = [(str(x.shape), x.dtype, x.device, str(x.stride())) for x in (old, new)]  # not by guards on symbols
    return forms[0] == forms[1]


def _check_results(program: Program) -> None:
    for kind in {type(o).__name__ for o in program.lasting}:
        raise ShardingError(
            f"forward returns a {kind} that is there before and after the call, and a program makes a new one",
            help="make the object in forward, or return the tensors in it",
        )
    for name, leaf in zip(program.names, program.leaves, strict=True):
        if not isinstance(leaf, SIMPLE):
            raise ShardingError(
                f"{name} is a {type(leaf).__name__}, which is neither a tensor nor a plain value",
                help="return tensors in lists, tuples, dicts, or a dataclass given to torch.export.register_dataclass",
            )


def _check_constant(node: Node, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise refusal_at(node, f"a {kind} cannot be part of a program", "draw with torch's default generator")
    if value.requires_grad:
        raise refusal_at(
            node,
            f"forward uses a tensor that requires grad but is no parameter or buffer of the module ({name})",
            "assign it to the module as an nn.Parameter, or detach it",
        )
    if not _has_memory(value):
        raise refusal_at(
            node,
            "forward returns an attribute of a tensor, such as x.T, x.mT or x.data, as it is",
            "return what an operator gives: x.t(), x.transpose(-2, -1), x.detach(), torch.real(x)",
        )


def _has_memory(value: Tensor) -> bool:
    """Not so of what Dynamo takes from a stand-in by itself: to read it would end the process."""
    try:
        value.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def _refuse_unsupported(joint: Joint, needed: Iterable[Node], data: bool) -> None:
    chosen = set(needed)
    sizes = symbols_of([node.meta["val"] for node in joint.primals.values()])
    for node in joint.nodes:
        if getattr(node.target, "namespace", "") in COMMUNICATION:
            raise communicates(node.meta.get("stack_trace"), str(node.target).removesuffix(".default"))
        if node not in chosen or node.op != "call_function":
            continue
        if is_higher_order(node.target):
            name = node.target.name()  # pyright: ignore
            raise refusal_at(node, f"{name} cannot be part of a sharded program", "write it with plain operators")
        if not data and depends_on_data(_numbers(node.meta.get("val")), sizes):
            name = str(node.target).removesuffix(".default")
            what = f"{name} makes a size or number that depends on the value of a tensor"
            raise refusal_at(node, what, VALUE_HELP, DependsOnValues)


def _numbers(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        yield from leaf.shape if isinstance(leaf, Tensor) else (leaf,)
