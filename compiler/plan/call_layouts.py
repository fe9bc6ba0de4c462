"""Layouts of what a call passes in and gets back: what compile's `inputs=` and `outputs=` say."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch.distributed.tensor import Placement, Replicate

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.layout import as_layout, counted
from shardc.compiler.plan.match import did_you_mean

Tree = Any  # a layout, None for the default, or a tuple, list or dict of trees
EXTRA = "*"  # names the positional arguments beyond forward's own: "*0", "*1", ...


class CallLayouts:
    """The user's `inputs` and `outputs` over a mesh, asked one tensor at a time.

    Raises PlanError at once for what is no layout, for mesh dims that do not exist, for an unknown
    parameter of forward and for more layouts than forward has positional parameters.
    """

    def __init__(self, inputs: Tree, outputs: Tree, forward: Callable[..., Any], names: tuple[str, ...]) -> None:
        self._forward = Forward.of(forward)
        self._inputs, self._outputs = inputs, outputs
        # A layout is for all that lies inside of its path.
        self._given = {("out", *path): layout for path, layout in _leaves(outputs, names, "outputs")}
        self._given |= {("in", *path): layout for path, layout in _leaves(self._by_name(inputs), names, "inputs")}

    def given(self, side: Literal["in", "out"], name: str, ndim: int) -> dict[str, Placement] | None:
        """Mesh dim -> placement of what enters or leaves at a readable path, as far as it splits; None where the user
        does not say. Of inputs: `x`, `batch['ids']`, `args[0]`; of outputs: `output[0]`, `[0]`."""
        path: tuple[Any, ...] = self._input(name) if side == "in" else ("out", *parse_path(name.removeprefix("output")))
        what = f"the input {name}" if side == "in" else f"the output {name.removeprefix('output')}".rstrip()
        if any(other[: len(path)] == path != other for other in self._given):
            raise PlanError(f"{what} is one tensor, but its parts have layouts", help="give it one layout")
        found = (self._given[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._given)
        layout = next(found, None)
        if layout is None or ndim == 0:
            return None if layout is None else {}
        return {axis: counted(p, ndim, what) for axis, p in layout.items() if not isinstance(p, Replicate)}

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises PlanError where a call has other counts of values than `inputs` has layouts."""
        if isinstance(self._inputs, (tuple, list)):
            count = len(self._inputs)
            given = len(args) + sum(name in kwargs for name in self._forward.positional[len(args) : count])
            if given != count:
                raise _wrong_count("inputs", count, f"the call has {given} positional arguments")
        inputs = self._by_name(self._inputs)
        if isinstance(inputs, Mapping):
            for i, value in enumerate(args):
                _check_shape(inputs.get(self._name_at(i)), value, f"inputs[{i}]")
            for name, value in kwargs.items():
                _check_shape(inputs.get(name), value, f"inputs for {name}")

    def check_result(self, value: Any) -> None:
        """Raises PlanError where forward returns another count of values than `outputs` has layouts."""
        _check_shape(self._outputs, value, "outputs")

    def _by_name(self, inputs: Tree) -> Tree:
        """The layouts of a tuple or dict by the names of forward's parameters; one for all as it is."""
        if isinstance(inputs, (tuple, list)):
            if not self._forward.may_take(len(inputs)):
                count = len(self._forward.positional)
                raise _wrong_count("inputs", len(inputs), f"forward takes {count} positional arguments")
            return {self._name_at(i): tree for i, tree in enumerate(inputs)}
        for name in inputs if isinstance(inputs, Mapping) else ():
            if not self._forward.may_have(name):
                raise PlanError(
                    f"inputs names {name}, but forward takes {', '.join(self._forward.names) or 'nothing'}",
                    help=did_you_mean(str(name), self._forward.names),
                )
        return inputs

    def _name_at(self, position: int) -> str:
        own = self._forward.positional
        return own[position] if position < len(own) else f"{EXTRA}{position - len(own)}"

    def _input(self, path: str) -> tuple[Any, ...]:
        head, *keys = parse_path(path)
        if keys and head in (self._forward.rest, self._forward.options):
            head = len(self._forward.positional) + keys[0] if head == self._forward.rest else keys[0]
            keys = keys[1:]
        return ("in", self._name_at(head) if isinstance(head, int) else head, *keys)


def parse_path(text: str) -> list[Any]:
    """The keys of a readable path: `batch['ids'][0]` is "batch", "ids", 0; a leading number is a key too."""
    keys: list[Any] = []
    try:
        node = ast.parse(f"_{text}" if text[:1] in ("", "[", ".") else text, mode="eval").body
        while not isinstance(node, (ast.Name, ast.Constant)):
            if isinstance(node, ast.Attribute):
                keys.append(node.attr)
            elif isinstance(node, ast.Subscript):
                keys.append(ast.literal_eval(node.slice))
            else:
                raise ValueError(text)
            node = node.value
    except (SyntaxError, ValueError):
        return [text]  # a key that is no literal: the path is known by its whole text only
    head = node.id if isinstance(node, ast.Name) else node.value
    return ([] if head == "_" and text[:1] in ("", "[", ".") else [head]) + keys[::-1]


def _leaves(tree: Tree, names: tuple[str, ...], what: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Placement]]]:
    """The path of each layout in a tree, and what it says; a mistake is found before the first call."""
    if isinstance(tree, (Mapping, tuple, list)):
        for key, part in _parts(tree):
            for path, layout in _leaves(part, names, f"{what}[{key!r}]"):
                yield (key, *path), layout
    elif tree is not None:
        yield (), as_layout(tree, names, what)


def _parts(tree: Tree) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    return zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)


def _check_shape(tree: Tree, value: Any, what: str) -> None:
    """The containers of a tree of layouts fit those of the value: as many parts, and known keys."""
    if isinstance(tree, Mapping) and isinstance(value, Mapping):
        for key in tree:
            if key not in value:
                known = [str(k) for k in value]
                raise PlanError(f"{what} names {key}, which is not there", help=did_you_mean(str(key), known))
            _check_shape(tree[key], value[key], f"{what}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        if not isinstance(value, (tuple, list)):
            raise _wrong_count(what, len(tree), "there is one value")
        if len(value) != len(tree):
            raise _wrong_count(what, len(tree), f"is for {len(value)} values")
        if hasattr(tree, "_fields") != hasattr(value, "_fields"):
            raise _wrong_count(what, len(tree), f"is for a {type(value).__name__}")
        for i, (part, v) in enumerate(zip(tree, value, strict=True)):
            _check_shape(part, v, f"{what}[{i}]")


def _wrong_count(what: str, count: int, found: str) -> PlanError:
    return PlanError(f"{what} has {count} layouts, but {found}", help="give one layout for each, None for the default")
