"""Reads a program's text, in full or as it is printed, back into a graph.

Files are data: nothing that is read is run. Operators are looked up among those that are registered, and nobody calls
them here; types, sizes, strides and devices are as they are written. Raises PlanError, with the line, for all else.
"""

from __future__ import annotations

import inspect
import operator
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from shardc.compiler.errors import PlanError
from shardc.compiler.ir import collectives as c
from shardc.compiler.ir.graph import Unrun
from shardc.compiler.ir.marks import Placement, UnlessPending
from shardc.compiler.ir.node import View, of, operands, val
from shardc.compiler.ir.signature import NUMBERS, Input, Leaf, Output, OutputKind, Signature, Traced
from shardc.compiler.ir.text import WORDS
from shardc.compiler.ir.text.full import LATE, SAID, operator_named, says_layout, usual_device, usual_phase
from shardc.compiler.ir.text.literals import Scanner
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.sizes import DataSize, Number, name_shape
from shardc.compiler.spec.spec import Spec

MOST_RANKS = 1 << 24
KINDS = {word: kind for kind, word in WORDS.items()}
# What may stand behind a line, and its type: the program's first, a value's, the last, a result's.
OF_PROGRAM = {
    "stage": str,
    "sizes": dict,
    "ran": int,
    "data": tuple,
    "buckets": dict,
    "reduce": dict,
    "strict": bool,
    "rng": str,
}
OF_VALUE: dict[str, Any] = {name: type(vars(View)[name].default) for name in SAID}
OF_VALUE |= {"custom": dict, "unit": str, "kept": (bool, Spec), "wire": torch.dtype}  # as a rule there is none
OF_VALUE |= {"at": str, "phase": str, "wants": tuple, "local": bool, "none": list, "stride": list}
OF_VALUE |= {"device": torch.device, "requires_grad": bool}
OF_CALL = {
    "in_spec": pytree.TreeSpec,
    "out_spec": pytree.TreeSpec,
    "positional": int,
    "notes": tuple,
    "keywords": tuple,
    "tied": dict,
    "leaves": list,
}
OF_RESULT = {"requires_grad": bool, "number": str, "constant": object}


@dataclass(frozen=True)
class Written:
    """What a text holds. head: what its first line says beside the mesh."""

    traced: Traced
    mesh: Mesh
    head: Mapping[str, Any]


def read(text: str, name: str = "line", stage: str = "TRACED") -> Written:
    """Raises PlanError. name: of the file, for errors; stage: of a text that does not say it itself."""
    lines = [(f"{name}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    where, first = lines[0] if lines else (name, "")
    reader = _Reader(Scanner(first, where), stage)
    for where, line in lines[1:]:
        reader.line(line, where)
    return reader.written(where)


class _Reader:
    """A graph as it grows, a line at a time."""

    def __init__(self, first: Scanner, stage: str) -> None:
        self._graph, self._nodes, self._mode = Graph(), {}, FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs: list[Input] = []
        self._outputs: list[Output] = []
        self._ends: Sequence[Any] | None = None  # what is returned
        first.need("mesh", "the mesh, as `mesh dp=2 tp=2`")
        ranks = {}
        while found := first.take(r" ([A-Za-z_][\w-]*)=(\d{1,9})"):
            ranks[found[1]] = int(found[2])
        self._mesh = Mesh(**ranks)
        self._head = {"stage": stage, **first.attributes(OF_PROGRAM)}
        sizes = self._head.pop("sizes", {}).items()
        if self._mesh.size > MOST_RANKS or not all(isinstance(most, int | None) for _, most in sizes):
            raise first.refuse("too many ranks, or no such sizes")
        self._sizes = {str(name): DataSize(str(name), most) for name, most in sizes}

    def line(self, line: str, where: str) -> None:
        s = Scanner(line, where, self._mesh, self._nodes, self._sizes)
        if self._ends is not None:
            self._result(s, self._ends)
        elif s.take("return "):
            self._return(s)
        else:
            self._value(s)

    def _value(self, s: Scanner) -> None:
        name = s.need(r"%([A-Za-z_]\w*): ", "a value, as `%x: f32[8] = ...`")[1]
        types, word = s.type(), s.need(r" = ([\w.]+)", "what it is made by")[1]
        entry = None if s.take(r"\(") else self._input(s, name, word)
        node = self._graph.placeholder(name) if entry else self._called(s, name, word)
        if node.name != name:
            raise s.refuse(f"%{name} is there already, or cannot be a value's name")
        made_by, about = s.take(r"  # ([\w-]+)"), s.attributes(OF_VALUE)
        if entry is not None:
            self._inputs.append(replace(entry, requires_grad=about.get("requires_grad", False)))
        phase = usual_phase(node, entry is not None and entry.kind in LATE)
        node.meta = self._said(s, node, about, phase) | self._held(s, node, types, about)
        node.meta |= {"made_by": made_by[1]} if made_by else {}
        self._nodes[name] = node

    def _input(self, s: Scanner, name: str, word: str) -> Input:
        if word not in KINDS:
            raise s.refuse(f"{word} is no kind of input, and calls nothing")
        if len(self._inputs) < len(self._nodes):
            raise s.refuse("inputs come first")
        if found := s.take(r" of output (\d{1,9})"):
            return Input(name, KINDS[word], name, of=int(found[1]))
        return Input(name, KINDS[word], s.string() if s.take(" (?! )") else name)

    def _called(self, s: Scanner, name: str, word: str) -> Node:
        target = operator_named(word)
        if target is None:
            raise s.refuse(f"{word} is no operator here: import first what registers it")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while not s.take(r"\)"):
            if args or kwargs:
                s.need(", ", "a comma")
            key = s.take(r"([A-Za-z_]\w*)=")
            value = s.layout() if target is c.reshard and len(args) == 1 else s.value()
            if key is None:
                args.append(value)
            else:
                kwargs[key[1]] = value
        fault = _misfit(target, args, kwargs, s)
        if fault:
            raise s.refuse(f"{word} cannot be called so: {fault}")
        return self._graph.create_node("call_function", target, tuple(args), kwargs, name)

    def _said(self, s: Scanner, node: Node, about: dict[str, Any], phase: str) -> dict[str, Any]:
        """What a line says of its node, by the keys of meta."""
        said = {"phase": phase, **({"region": ""} if node.op == "call_function" else {})}
        said |= {name: about[name] for name in ("phase", "wants", *SAID) if name in about}
        wants, kinds = said.get("wants", ()), (str, (Placement, UnlessPending), bool, str)
        fits = all(isinstance(w, tuple) and list(map(isinstance, w, kinds)) == [True] * 4 for w in said.get("wish", ()))
        fits = fits and all(isinstance(w, Spec) for w in wants) and len(wants) in (0, len(operands(node)))
        if not fits or said["phase"] not in ("forward", "backward"):
            raise s.refuse("no such phase, wish or layout that is wanted")
        file, colon, rest = about.get("at", "").rpartition(":")
        number = re.match(r"\d{1,9}", rest)
        said |= {"where": f"{os.path.basename(file)}{colon}{rest}"} if rest else {}
        return said | ({"file": file, "line": int(number[0])} if number and os.path.isabs(file) else {})

    def _held(self, s: Scanner, node: Node, types: Any, about: dict[str, Any]) -> dict[str, Any]:
        """The value and layouts that a type says."""
        if isinstance(types, Number):
            return {"val": types}
        pairs, several = (types, True) if isinstance(types, list) else ([types], False)
        layouts = tuple(layout for _, layout in pairs)
        strides, local = about.get("stride", [None] * len(pairs)), about.get("local", False)
        if len(strides) != len(pairs):
            raise s.refuse("a stride for each tensor, or none")
        device = torch.device("meta") if local else about.get("device", usual_device(node))
        with nullcontext() if local else self._mode:
            made: list[Any] = [s.made(_tensor, *pair, n, device) for pair, n in zip(pairs, strides, strict=True)]
        for i in about.get("none", ()):
            s.made(made.insert, i, None)
        value = tuple(made) if several else made[0]
        if local:
            return {"local": value}
        if not says_layout(node, layouts, self._head["stage"]):
            return {"val": value}
        return {"val": value, "spec": layouts if several else layouts[0]}

    def _return(self, s: Scanner) -> None:
        ends = s.value()
        if not isinstance(ends, tuple) or not all(end is None or isinstance(end, Node) for end in ends):
            raise s.refuse("a program returns values, or None, in parentheses")
        self._call = {"in_spec": None, "out_spec": None, "positional": 0, "keywords": (), "tied": {}}
        self._call |= s.attributes(OF_CALL)
        self._call["leaves"] = tuple(s.made(self._leaf, leaf) for leaf in self._call.get("leaves", ()))
        self._graph.output(ends)
        self._ends = ends

    def _leaf(self, written: tuple[str, Any]) -> Leaf:
        name, value = written
        return Leaf(name, self._place(value)) if isinstance(value, Node) else Leaf(name, None, value)

    def _place(self, node: Node) -> int:
        """Which input a value is. Raises ValueError where it is none."""
        return [entry.node for entry in self._inputs].index(node.name)

    def _result(self, s: Scanner, ends: Sequence[Any]) -> None:
        kind = OutputKind(s.need("output|gradient|mutation", "what is returned: an output, gradient or mutation")[0])
        source = s.made(self._place, s.node()) if s.take(" %") else None
        name = s.string() if source is None and s.take(" (?! )") else self._inputs[source or 0].name
        about = s.attributes(OF_RESULT)
        if len(self._outputs) == len(ends) or (source is None) != (kind is OutputKind.OUTPUT):
            raise s.refuse("it describes no result, or does not name the value whose gradient or new value it is")
        if about.get("number", "") not in ("", *NUMBERS):
            raise s.refuse("no such kind of number")
        end = ends[len(self._outputs)]
        self._outputs.append(Output(end and end.name, kind, name, source, **about))

    def written(self, where: str) -> Written:
        names = [end and end.name for end in self._ends or ()]
        results = self._outputs or [Output(n, OutputKind.OUTPUT, f"output[{i}]") for i, n in enumerate(names)]
        late = [entry.of for entry in self._inputs if entry.of is not None]
        if self._ends is None or len(results) != len(names) or not all(i < len(names) for i in late):
            raise PlanError("the program returns nothing, or not what its lines describe", where=where)
        inputs = [e if e.of is None else replace(e, name=results[e.of].name) for e in self._inputs]
        signature = Signature(tuple(inputs), tuple(results), **self._call)
        return Written(Traced(Unrun(nn.Module(), self._graph), signature), self._mesh, self._head)


def _tensor(dtype: torch.dtype, layout: Spec, stride: Any, device: torch.device) -> Tensor:
    sizes = [int(n) for n in layout.shape]
    if stride is None:
        return name_shape(torch.empty(sizes, dtype=dtype, device=device), layout.shape)
    return name_shape(torch.empty_strided(sizes, stride, dtype=dtype, device=device), layout.shape)


def _misfit(target: Any, args: list[Any], kwargs: dict[str, Any], s: Scanner) -> str:
    """What keeps a call from being one of this operator; empty where nothing does."""
    if isinstance(target, OpOverload):
        known = target._schema.arguments
        given = dict(zip([a.name for a in known if not a.kwarg_only], args, strict=False)) | kwargs
        if {*given} - {a.name for a in known} or len(given) != len(args) + len(kwargs):
            return "it does not take so many arguments, or not of these names"
        numbers = (Node, int, float, complex)  # a number may stand for a tensor
        wrong = [a.name for a in known if a.name not in given and not a.has_default_value()]
        wrong += [a.name for a in known if str(a.type) == "Tensor" and not isinstance(given.get(a.name, 0), numbers)]
        return f"{wrong[0]} is to be a value" if wrong else ""
    if target is c.start and len(args) > 1:
        target, args = c.NAMED.get(str(args[1]), c.start), [args[0], *args[2:]]
    try:
        named = inspect.signature(target).bind(*args, **kwargs).arguments
    except TypeError as error:
        return str(error)
    if target is operator.getitem:
        source = args[0] if isinstance(args[0], Node) else None
        results = source and (of(source).local if val(source) is None else val(source))
        there = isinstance(results, (tuple, list)) and isinstance(args[1], int) and 0 <= args[1] < len(results)
        return "" if there else "there is no such result"
    return "" if "axis" not in named or s.axis(str(named["axis"])) else "it has no mesh dim"
