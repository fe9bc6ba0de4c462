"""Values and types as they stand in a program's text, written and read: `[8@dp, 4]`, `"a b"`, `%x`, `f32[8@dp, 4]+tp`.

What is read is data: a pattern for each kind of word, tables for names, and nothing that is run.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from shardc.compiler.errors import PlanError
from shardc.compiler.ir.marks import Placement, UnlessPending, parse_placement, placement_text
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.rank_numbers import Local
from shardc.compiler.spec.sizes import DataSize, Number
from shardc.compiler.spec.spec import DTYPES, Part, Spec

DEEPEST = 40  # lists in lists
NAMED = torch.dtype | torch.layout | torch.memory_format
CONSTANTS: dict[str, Any] = {str(x): x for x in vars(torch).values() if isinstance(x, NAMED)}
CONSTANTS |= {name.removeprefix("torch."): x for name, x in CONSTANTS.items() if isinstance(x, torch.dtype)}
CONSTANTS |= {name: dtype for dtype, name in DTYPES.items()}
CONSTANTS |= {"None": None, "True": True, "False": False, "Ellipsis": ..., "inf": float("inf"), "nan": float("nan")}

BARE = re.compile(r"[A-Za-z_|][\w.|/]*")  # a string that needs no quotes, unless something has this name
RAW = re.compile(r"""[ !#-&(-\[\]-~]*"[ -&(-\[\]-~]*""")  # one that holds double quotes, and goes into single ones
STRING, WORD = r'"(?:[^"\\]|\\.)*"', r"[A-Za-z_|](?:[^\s,()\[\]{}=\":]|:(?! ))*"
INT = r"-?\d{1,20}(?![\w.@*])"
FLOAT = r"-?(?:\d{1,400}(?:\.\d{0,400})?(?:e[+-]?\d{1,4})?|inf)(?![\w.@])"
AXIS, SIZE = r"[A-Za-z_][\w-]*(?:/\d{1,9})?", r"\d{1,18}(?!\d)"
PART = rf"{SIZE}(?:@{AXIS}(?:\.{AXIS})*)?"
SPLIT = rf"(?:\((?:{PART} )+{PART}\)|{SIZE}@{AXIS}(?:\.{AXIS})*)"
LOCAL = (
    rf"(?P<open>\()?(?P<times>-?{SIZE}\*|-)?(?:(?P<kind>start|stop|place)\()?(?P<dim>{SPLIT})(?(kind)\))"
    rf"(?P<plus>[+-]{SIZE})?(?(open)\)%(?P<modulo>{SIZE}))"
)
NUMBER = r"(int|float|bool|check)\b(?: (?!= )(.*?))?(?= = )"


class NoForm(Exception):
    """A value that text cannot hold."""


def literal(value: Any) -> str:
    """A value as it is read back. Raises NoForm for what has no form."""
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, str):
        if BARE.fullmatch(value) and value not in {*CONSTANTS, *FORMS, "layout"}:
            return value
        return f"'{value}'" if RAW.fullmatch(value) else json.dumps(value)
    if isinstance(value, Spec):
        return f"layout{value}"
    if value is None or value is ... or type(value) in (bool, int, float, Local):
        return str(value)
    if isinstance(value, NAMED):
        return DTYPES[value] if isinstance(value, torch.dtype) and value in DTYPES else str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(k)}: {literal(v)}' for k, v in value.items())}}}"
    for name, (kind, parts, _) in FORMS.items():
        if isinstance(value, kind):
            return f"{name}({', '.join(map(literal, parts(value)))})"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    raise NoForm(f"it holds a {(value if isinstance(value, type) else type(value)).__name__}")


def _types() -> dict[str, Any]:
    """What pytrees take apart here, by the name it was registered under; what has no name is not to be named."""
    return {n: t for n, t in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items() if n != pytree.NO_SERIALIZED_TYPE_NAME_FOUND}


def _branches(tree: pytree.TreeSpec) -> list[Any]:
    """Its root's type and context, and what hangs there; nothing of a leaf."""
    if tree.is_leaf():
        return []
    name = next((name for name, kind in _types().items() if kind is tree.type), None)
    if name is None:
        raise NoForm(f"it holds a {tree.type.__name__}")
    return [name, tree.context, *tree.children()]


def _tree(name: str = "", context: Any = None, *branches: pytree.TreeSpec) -> pytree.TreeSpec:
    return pytree.TreeSpec(_types()[name], context, list(branches)) if name else pytree.treespec_leaf()


# How values are written that are calls of a name: their type, their parts, and what makes one of them.
FORMS: dict[str, tuple[Any, Callable[[Any], list[Any]], Callable[..., Any]]] = {
    "slice": (slice, lambda x: [x.start, x.stop, x.step], slice),
    "complex": (complex, lambda x: [x.real, x.imag], complex),
    "device": (torch.device, lambda x: [str(x)], torch.device),
    "bytes": (bytes, lambda x: [base64.b64encode(x).decode()], lambda x: base64.b64decode(x, validate=True)),
    "placement": (Placement, lambda x: [placement_text(x)], parse_placement),
    "unless_pending": (UnlessPending, lambda x: [x.layout, x.axes], UnlessPending),
    "tree": (pytree.TreeSpec, _branches, _tree),
}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


class Scanner:
    """Reads one line from left to right. Raises PlanError, with the line and what was expected there.

    nodes: the values made above, by name; sizes: those that data decides, likewise.
    """

    def __init__(
        self,
        line: str,
        where: str = "",
        mesh: Mesh | None = None,
        nodes: Mapping[str, Node] | None = None,
        sizes: Mapping[str, DataSize] | None = None,
    ) -> None:
        self._line, self._where, self._at, self._depth = line, where, 0, 0
        self._mesh, self._nodes, self._sizes = mesh or Mesh(), nodes or {}, sizes or {}

    def refuse(self, what: str) -> PlanError:
        shown = f"{self._line[max(0, self._at - 60) : self._at]} >>> {self._line[self._at : self._at + 60]}"
        return PlanError(what, where=self._where, excerpt=shown, help="docs/program_text.md says how it is written")

    def take(self, pattern: str) -> re.Match[str] | None:
        """What matches here, if something does, which is then behind."""
        found = _compiled(pattern).match(self._line, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def need(self, pattern: str, what: str) -> re.Match[str]:
        found = self.take(pattern)
        if found is None:
            raise self.refuse(f"expected {what}")
        return found

    def made(self, make: Callable[..., Any], *parts: Any) -> Any:
        """A value of what was read. Makers refuse what they cannot take, each in its own way."""
        try:
            return make(*parts)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
            raise self.refuse(f"no such value: {str(error)[:200]}") from None

    def value(self) -> Any:
        """Any argument or attribute."""
        if self.take("%"):
            return self.node()
        if found := self.take(INT):
            return int(found[0])
        if found := self.take(LOCAL):
            times = {"": 1, "-": -1}.get(found["times"] or "") or int(found["times"].rstrip("*"))
            numbers = times, int(found["plus"] or 0), int(found["modulo"] or 0)
            return Local(self._dim(found["dim"]), found["kind"] or "size", *numbers)
        if found := self.take(FLOAT):
            return float(found[0])
        if self.take(r"\["):
            return self.items(r"\]", self.value)
        if self.take(r"\("):
            return tuple(self.items(r"\)", self.value))
        if self.take(r"\{"):
            return self.made(dict, self.items(r"\}", self._pair))
        if self.take("(?=['\"])"):
            return self.string()
        if self.take(r"(?=layout\[)"):
            return self.layout()
        word = self.need(WORD, "a value")[0]
        if word in FORMS and self.take(r"\("):
            return self.made(FORMS[word][2], *self.items(r"\)", self.value))
        return CONSTANTS.get(word, word)

    def items(self, end: str, item: Callable[[], Any]) -> list[Any]:
        """What stands between commas, up to `end`."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise self.refuse(f"more than {DEEPEST} lists in one another")
        out: list[Any] = []
        while not self.take(end):
            if out:
                self.need(", ", "a comma")
            out.append(item())
        self._depth -= 1
        return out

    def _pair(self) -> tuple[Any, Any]:
        key = self.value()
        self.need(": ", "a colon")
        return key, self.value()

    def string(self) -> str:
        """In quotes, or up to the next space."""
        if found := self.take("'([^']*)'"):
            return found[1]
        found = self.take(STRING)
        return self.made(json.loads, found[0]) if found else self.need(r'[^\s"]+', "a name")[0]

    def node(self) -> Node:
        name = self.need(r"\w+", "a value's name")[0]
        if name not in self._nodes:
            raise self.refuse(f"no value %{name} is made above")
        return self._nodes[name]

    def layout(self) -> Spec:
        """`[8@dp, 4]+tp`"""
        self.need(r"(?:layout)?\[", "a layout")
        dims, pending = self.items(r"\]", self._next_dim), []
        while found := self.take(rf"\+(?:(\w+)\()?({AXIS})(?(1)\))"):
            pending.append((self.axis(found[2]), found[1] or "sum"))
        return Spec(tuple(dims), tuple(pending))

    def _next_dim(self) -> tuple[Part, ...]:
        named = "|".join(map(re.escape, sorted(self._sizes, key=len, reverse=True)))
        if named and (found := self.take(rf"(?:{named})(?=[,\]])")):
            return (Part(self._sizes[found[0]]),)
        return self._dim(self.need(f"{SPLIT}|{PART}", "a size")[0])

    def _dim(self, text: str) -> tuple[Part, ...]:
        words = [word.partition("@") for word in text.strip("()").split(" ")]
        return tuple(Part(int(n), tuple(map(self.axis, a.split("."))) if a else ()) for n, _, a in words)

    def axis(self, name: str) -> str:
        """The name of a mesh dim, or of a part of one."""
        dim, slash, ways = name.partition("/")
        if dim not in self._mesh or (slash and (not ways.isdecimal() or int(ways) < 1 or self._mesh[dim] % int(ways))):
            raise self.refuse(f"no mesh dim {name}")
        return name

    def type(self) -> Any:
        """Of a value: (dtype, layout), a list of such, or a Number."""
        if found := self.take(NUMBER):
            return Number(found[1], found[2] or "")
        return self.items(r"\)", self._tensor_type) if self.take(r"\(") else self._tensor_type()

    def _tensor_type(self) -> tuple[torch.dtype, Spec]:
        word = self.need(r"\w+", "a type")[0]
        if not isinstance(CONSTANTS.get(word), torch.dtype):
            raise self.refuse(f"no dtype {word}")
        return CONSTANTS[word], self.layout()

    def attributes(self, types: Mapping[str, Any]) -> dict[str, Any]:
        """`!{name=value, ...}`, or nothing, and then the end of the line."""
        given = dict(self.items(r"\}", self._named) if self.take(r"  !\{") else ())
        for name, value in given.items():
            if not isinstance(value, types.get(name, ())):
                raise self.refuse(f"no attribute {name} of this kind")
        if self._at < len(self._line):
            raise self.refuse("expected the end of the line")
        return given

    def _named(self) -> tuple[str, Any]:
        return self.need(r"(\w+)=", "a name")[1], self.value()
