"""A program's text in full: what is printed, and behind each line what else is known of its value.

    mesh dp=2 tp=2  !{stage=SHARDED}
    %x: f32[8@dp, 4] = input x
    %w: f32[4, 6@tp] = param layers.0.w  !{requires_grad=True}
    %mm: f32[8@dp, 6@tp] = aten.mm(%x, %w)  !{at="/net/model.py:3 in forward", path=layers.0}
    return (%mm)
    output output

What is so as a rule is left out. docs/program_text.md has the grammar, `reader` reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.node import Said, View, of, operands, specs, target_name, tensors, val
from shardc.compiler.ir.signature import Input, InputKind, OutputKind, Signature, Traced
from shardc.compiler.ir.text import WORDS, line
from shardc.compiler.ir.text.literals import NoForm, literal
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import DataSize, named_shape
from shardc.compiler.spec.spec import Spec

NUMBERS = "add sub mul truediv floordiv mod pow neg and_ or_ not_ lt le gt ge eq ne getitem"
FUNCTIONS: dict[str, Any] = {f.__name__: f for f in (getattr(operator, name) for name in NUMBERS.split())}
FUNCTIONS |= {f.__name__: f for f in (getattr(torch, name) for name in torch.__all__ if name.startswith("sym_"))}
FUNCTIONS |= {f"shardc.{f.__name__}": f for f in c.SYMBOLIC}
APART = ("where", "file", "line", "phase", "made_by", "wants", "rule", "local")  # what is written otherwise, or not
SAID = tuple(name for name, said in vars(View).items() if isinstance(said, Said) and name not in APART)
CALL = ("in_spec", "out_spec", "positional", "keywords", "tied", "notes")  # of a signature
LATE = (InputKind.TANGENT, InputKind.CARRY)


def full_text(traced: Traced, mesh: Mesh, stage: str, **head: Any) -> str:
    """Raises ShardingError, naming the value, for what has no form as text. head: what else the first line says."""
    signature, nodes = traced.signature, list(traced.gm.graph.nodes)
    sizes = {str(n): n for node in nodes for t in tensors(node) for n in named_shape(t) if isinstance(n, DataSize)}
    bounds = {name: int(n) if n.bounded else None for name, n in sizes.items()}
    lines = [str(mesh).rstrip() + _attributes(stage=stage, sizes=bounds, **head)]
    for node, entry in zip(nodes, [*signature.inputs, *[None] * len(nodes)], strict=False):
        try:
            lines += _ends(node, signature) if node.op == "output" else [_line(node, entry, stage)]
        except NoForm as error:
            what = "the program's inputs or results" if node.op == "output" else f"%{node.name}"
            help = "compile where the program runs, instead of loading it"
            raise ShardingError(f"{what} cannot be saved: {error}", where=of(node).where, help=help) from None
    return "\n".join(lines)


def _line(node: Node, entry: Input | None, stage: str) -> str:
    about = _about(node, stage, entry is not None and entry.kind in LATE)
    if entry is None:
        return str(line(node, show=literal)) + _attributes(**about)
    name = f"of output {entry.of}" if entry.kind is InputKind.TANGENT else literal(entry.name)
    names = {node.name: f"{WORDS[entry.kind]} {name}"}
    return str(line(node, names)) + _attributes(requires_grad=entry.requires_grad, **about)


def _ends(node: Node, signature: Signature) -> list[str]:
    """What is returned, how it is called, and a line for each result: `gradient %layers_0_w`, `output output`."""
    nodes = [n for n in node.graph.nodes if n.op == "placeholder"]
    leaves = [(x.name, x.constant if x.input is None else nodes[x.input]) for x in signature.leaves]
    call = {name: getattr(signature, name) for name in CALL}
    return [str(line(node, show=literal)) + _attributes(leaves=leaves, **call)] + [
        f"{x.kind.value} {literal(x.name if x.kind is OutputKind.OUTPUT else nodes[x.of or 0])}"
        + _attributes(requires_grad=x.requires_grad, number=x.number, constant=x.constant)
        for x in signature.outputs
    ]


def _about(node: Node, stage: str, late: bool) -> dict[str, Any]:
    said, values, results = of(node), tensors(node), val(node) if isinstance(val(node), (tuple, list)) else ()
    if node.op == "call_function" and operator_named(target_name(node.target)) is not node.target:
        raise NoForm(f"its operator is {node.target}")
    if any(t.layout is not torch.strided or t.is_conj() or t.is_neg() for t in values):
        raise NoForm("it holds a tensor that is not dense")
    if sum(x is not None for x in results) not in (0, len(values)):
        raise NoForm("its results are nested")
    arriving = tuple([s for n in operands(node) for s in specs(n)])
    return {
        "at": f"{said.file}:{said.where.partition(':')[2]}" if said.file and said.where else said.where,
        "phase": said.phase if said.phase != usual_phase(node, late) else None,
        **{name: getattr(said, name) for name in SAID},
        "wants": said.wants if said.wants != arriving else None,
        "local": not specs(node) and said.local is not None,
        "none": [i for i, x in enumerate(results) if x is None],
        "stride": [] if all(t.is_contiguous() for t in values) else [t.stride() for t in values],
        "device": values[0].device if values and values[0].device != usual_device(node) else None,
    }


def usual_phase(node: Node, late: bool = False) -> str:
    """What is made from a value of backward is of backward."""
    late = late or any(of(n).phase == "backward" for n in node.all_input_nodes)
    return "backward" if late else "forward"


def usual_device(node: Node) -> torch.device:
    """Results lie where the first operand lies."""
    return next((t.device for n in node.all_input_nodes for t in tensors(n)), torch.device("cpu"))


def says_layout(node: Node, layouts: Sequence[Spec], stage: str) -> bool:
    """Whether a type is more than a shape: before propagation, those of inputs and whatever is split."""
    return stage != "TRACED" or node.op == "placeholder" or not all(layout.is_whole for layout in layouts)


def _attributes(unit: str | None = None, constant: Any = None, **about: Any) -> str:
    """`  !{name=value, ...}` of what is not empty. The root's unit is named "", and a constant may be anything."""
    given = {name: value for name, value in about.items() if value not in (None, False, "", (), [], {})}
    given |= {name: x for name, x in (("unit", unit), ("constant", constant)) if x is not None}
    shown = ", ".join(f"{name}={literal(value)}" for name, value in given.items())
    return f"  !{{{shown}}}" if shown else ""


def operator_named(name: str) -> Any:
    """The function or registered operator that a program calls by this name; None where there is none."""
    space, _, called = name.partition(".")
    if name in FUNCTIONS or not called:
        return FUNCTIONS.get(name)
    packet, _, overload = called.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, OpOverload) else None
