"""Layouts of the root's inputs and outputs: what compile's `inputs=` and `outputs=` say, and the defaults."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.tensor import Placement, Replicate, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.layout import Layout, as_layout
from shardc.compiler.plan.match import did_you_mean
from shardc.compiler.plan.styles import PLACEMENTS

Tree = Any  # a layout, None for the default, or a tuple, list or dict of trees
EXTRA = "*"  # names the positional arguments beyond forward's own: "*0", "*1", ...


class RootLayouts:
    """The user's `inputs` and `outputs` over a mesh, asked one tensor at a time.

    Raises PlanError at once for what is no layout, for mesh dims that do not exist, for an unknown
    parameter of forward and for more layouts than forward has positional parameters.
    """

    def __init__(
        self,
        inputs: Tree,
        outputs: Tree,
        forward: Callable[..., Any],
        names: tuple[str, ...],
        data_axes: tuple[str, ...],
    ) -> None:
        self._names, self._data_axes = names, data_axes
        self._forward = Forward.of(forward)
        _check_tree(inputs, names, "inputs")
        _check_tree(outputs, names, "outputs")
        self._every = inputs if _is_layout(inputs) else None
        self._count = len(inputs) if isinstance(inputs, (tuple, list)) else None
        self._inputs: dict[str, Tree] = self._by_name(inputs)
        self._outputs = outputs

    def input_layout(self, name: str, ndim: int) -> dict[str, Placement]:
        """Mesh dim -> placement of the input at a path such as `x` or `batch['ids']`; only what splits."""
        layout = self._find_input(name)
        return self._placements(layout, ndim, f"the input {name}")

    def says_input(self, name: str) -> bool:
        """Whether the user gave this input a layout, rather than the default."""
        return self._find_input(name) is not None

    def output_layout(self, path: str, ndim: int) -> dict[str, Placement]:
        """Mesh dim -> placement of the output at a path such as `output[0]`, or `[0]`; only what splits."""
        layout = self._find_output(path)
        return self._placements(layout, ndim, f"the output {path.removeprefix('output')}".rstrip())

    def says_output(self, path: str) -> bool:
        """Whether the user gave this output a layout, rather than the default."""
        return self._find_output(path) is not None

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises PlanError where a call has other counts of values than `inputs` has layouts."""
        own = self._forward.positional
        given = len(args) + sum(name in kwargs for name in own[len(args) : self._count])
        if self._count is not None and given != self._count:
            raise _wrong_count("inputs", self._count, f"the call has {given} positional arguments")
        for i, value in enumerate(args):
            _check_shape(self._inputs.get(self._name_at(i)), value, f"inputs[{i}]")
        for name, value in kwargs.items():
            _check_shape(self._inputs.get(name), value, f"inputs for {name}")

    def check_result(self, value: Any) -> None:
        """Raises PlanError where forward returns another count of values than `outputs` has layouts."""
        if isinstance(self._outputs, (tuple, list)) and not isinstance(value, (tuple, list)):
            raise _wrong_count("outputs", len(self._outputs), "forward returns one value")
        _check_shape(self._outputs, value, "outputs")

    def _by_name(self, inputs: Tree) -> dict[str, Tree]:
        """The layouts of a tuple or dict by the names of forward's parameters."""
        if isinstance(inputs, (tuple, list)):
            if not self._forward.may_take(len(inputs)):
                count = len(self._forward.positional)
                raise _wrong_count("inputs", len(inputs), f"forward takes {count} positional arguments")
            return {self._name_at(i): tree for i, tree in enumerate(inputs)}
        if not isinstance(inputs, Mapping):
            return {}
        for name in inputs:
            if not self._forward.may_have(name):
                raise PlanError(
                    f"inputs names {name}, but forward takes {', '.join(self._forward.names) or 'nothing'}",
                    help=did_you_mean(str(name), self._forward.names),
                )
        return dict(inputs)

    def _name_at(self, position: int) -> str:
        own = self._forward.positional
        return own[position] if position < len(own) else f"{EXTRA}{position - len(own)}"

    def _find_input(self, path: str) -> Tree:
        if self._every is not None:
            return self._every
        head, *keys = parse_path(path)
        if keys and head in (self._forward.rest, self._forward.options):
            head = len(self._forward.positional) + keys[0] if head == self._forward.rest else keys[0]
            keys = keys[1:]
        name = self._name_at(head) if isinstance(head, int) else head
        return _walk(self._inputs.get(name), keys, f"inputs for {path}")

    def _find_output(self, path: str) -> Tree:
        return _walk(self._outputs, parse_path(path.removeprefix("output")), "outputs")

    def _placements(self, layout: Tree, ndim: int, what: str) -> dict[str, Placement]:
        if ndim == 0:
            return {}
        if layout is None:
            return {axis: Shard(0) for axis in self._data_axes}
        given = as_layout(layout, self._names, what)
        return {axis: _within(p, ndim, what) for axis, p in given.items() if not isinstance(p, Replicate)}


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


def _is_layout(tree: Tree) -> bool:
    return isinstance(tree, (*PLACEMENTS, Layout))


def _check_tree(tree: Tree, names: tuple[str, ...], what: str) -> None:
    """Every leaf is a layout, so that a mistake is found before the first call."""
    if isinstance(tree, Mapping):
        for key, part in tree.items():
            _check_tree(part, names, f"{what}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for i, part in enumerate(tree):
            _check_tree(part, names, f"{what}[{i}]")
    elif tree is not None:
        as_layout(tree, names, what)


def _check_shape(tree: Tree, value: Any, what: str) -> None:
    """The containers of a tree of layouts fit those of the value: as many parts, and known keys."""
    if isinstance(tree, (tuple, list)):
        if not isinstance(value, (tuple, list)):
            raise _wrong_count(what, len(tree), f"is for one {type(value).__name__}")
        if len(value) != len(tree):
            raise _wrong_count(what, len(tree), f"is for {len(value)} values")
        for i, (part, v) in enumerate(zip(tree, value, strict=True)):
            _check_shape(part, v, f"{what}[{i}]")
    elif isinstance(tree, Mapping) and isinstance(value, Mapping):
        for key, part in tree.items():
            if key not in value:
                known = [str(k) for k in value]
                raise PlanError(f"{what} names {key}, which is not there", help=did_you_mean(str(key), known))
            _check_shape(part, value[key], f"{what}[{key!r}]")


def _walk(tree: Tree, keys: Sequence[Any], what: str) -> Tree:
    """The layout in a tree of layouts at a path of keys; None where there is none."""
    for i, key in enumerate(keys):
        if tree is None or _is_layout(tree):
            return tree
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(key, int) and key < len(tree):
            tree = tree[key]
        elif isinstance(key, str) and hasattr(tree, key):  # a named tuple
            tree = getattr(tree, key)
        else:
            raise _wrong_count(what, len(tree), f"is for something with a part {keys[i]!r}")
    if tree is not None and not _is_layout(tree):
        raise _wrong_count(what, len(tree), "is for one tensor")
    return tree


def _wrong_count(what: str, count: int, found: str) -> PlanError:
    return PlanError(f"{what} has {count} layouts, but {found}", help="give one layout for each, None for the default")


def _within(placement: Placement, ndim: int, what: str) -> Placement:
    """The placement with its dim counted from the front."""
    dim = getattr(placement, "dim", None)
    if dim is None:
        return placement
    if not -ndim <= dim < ndim:
        raise PlanError(f"{what} is split on dim {dim}, but has {ndim} dims", help="name one of its dims")
    return Shard(dim % ndim) if isinstance(placement, Shard) else placement
