"""What each input and output of a traced graph is, and how a user's arguments map onto them.

Invariants: `inputs` are the graph's placeholders in order, `outputs` the entries of its output tuple in
order (an entry without a node is None there). Inputs come as parameters, buffers, constants, batch,
tangents, carries; outputs as the leaves of what forward returns, then mutations, then gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule


class Effect(Protocol):
    """What each call does to one container: attributes of a module, a dict, a list."""

    name: str
    spec: Any  # pytree spec of the new values
    find: Callable[[Any], Any]  # of a call, (args, kwargs), the container as it is then

    def apply(self, call: Any, leaves: Sequence[Any]) -> None:
        """Do it to the container as it is at this call, (args, kwargs)."""
        ...


class Reads(Protocol):
    """What tracing read of attributes, containers and globals."""

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        ...

    def changed(self) -> list[str]:
        """Names of what is not."""
        ...


NUMBERS = {"int": int, "float": float, "bool": bool}


class InputKind(Enum):
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    BATCH = "batch"
    TANGENT = "tangent"
    CARRY = "carry"  # a gradient kept back at earlier steps, added in backward


class OutputKind(Enum):
    OUTPUT = "output"
    MUTATION = "mutation"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class TensorInfo:
    """What tracing needs to know of a tensor that it cannot, or need not, look at."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Of a real, fake, meta or distributed tensor (whose shape is the global one)."""
        shape, stride = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
        return cls(shape, stride, tensor.dtype, tensor.device, tensor.requires_grad)


@dataclass(frozen=True)
class Input:
    """A placeholder. `name` is the FQN of a parameter or buffer, or a path such as `x` or `batch['ids']`."""

    node: str
    kind: InputKind
    name: str
    requires_grad: bool = False
    value: Tensor | None = None  # of a CONSTANT
    of: int | None = None  # of a TANGENT: index in `outputs` of the OUTPUT it belongs to
    rows: bool | None = None  # of BATCH: whether its ranks were taken to pass parts of it; None where nobody asked


@dataclass(frozen=True)
class Output:
    """An entry of the output tuple; without a node, `constant` is what the user gets (None for a gradient)."""

    node: str | None
    kind: OutputKind
    name: str
    of: int | None = None  # of a GRADIENT or MUTATION: index in `inputs`
    constant: Any = None
    requires_grad: bool = False
    same: int | None = None  # index of an earlier OUTPUT: to the user the very same tensor
    number: str = ""  # "int", "float" or "bool": the user gets that Python number of this tensor without dims


@dataclass(frozen=True)
class Leaf:
    """A leaf of the user's arguments: a tensor, `input` being its index in `inputs`, or a Python value."""

    name: str
    input: int | None = None
    constant: Any = None


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one traced graph, and the structures of the user's arguments and results."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    in_spec: Any  # pytree spec of (args, kwargs)
    out_spec: Any  # pytree spec of what forward returns
    leaves: tuple[Leaf, ...]  # of in_spec, in its order
    positional: int
    keywords: tuple[str, ...]
    tied: Mapping[str, str]  # every other FQN of a tied parameter or buffer -> the FQN in `inputs`
    notes: tuple[str, ...] = ()  # what tracing reports
    # What forward sets beside tensors, whose new values are the last of the OUTPUTs:
    effects: tuple[Effect, ...] = field(default=(), compare=False, repr=False)
    reads: Reads | None = field(default=None, compare=False, repr=False)  # what tracing read beside tensors

    def holds(self) -> bool:
        """Whether what tracing read is as it was, so that the program is still that of the module."""
        return self.reads is None or self.reads.hold()

    def indices(self, *kinds: InputKind | OutputKind) -> list[int]:
        """Positions of the inputs, or of the outputs, of the given kinds."""
        entries: Sequence[Input | Output] = self.inputs if isinstance(kinds[0], InputKind) else self.outputs
        return [i for i, entry in enumerate(entries) if entry.kind in kinds]

    def index(self, name: str) -> int:
        """Position among the inputs of the parameter or buffer with this FQN, aliases of tied ones included."""
        canonical = self.tied.get(name, name)
        for i in self.indices(InputKind.PARAMETER, InputKind.BUFFER):
            if self.inputs[i].name == canonical:
                return i
        raise KeyError(name)

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among a call's arguments, in BATCH order.

        TypeError or ValueError where the call is not of the form that was traced: other counts, another
        structure, a tensor in place of a number or the reverse, another number, string, bool or None.
        """
        self._check_counts(args, kwargs)
        try:
            values = self.in_spec.flatten_up_to((tuple(args), dict(kwargs)))
        except ValueError as error:
            raise ValueError(f"the arguments are nested otherwise than when traced: {error}") from error
        for leaf, value in zip(self.leaves, values, strict=True):
            _check_leaf(leaf, value)
        return [value for leaf, value in zip(self.leaves, values, strict=True) if leaf.input is not None]

    def unflatten_outputs(self, values: Sequence[Tensor]) -> Any:
        """What the user gets, in forward's own structure: `values` are the OUTPUTs that have a node, in order."""
        return self.out_spec.unflatten(self._leaves(values)[: self.out_spec.num_leaves])

    def apply_effects(self, values: Sequence[Tensor], call: Any) -> None:
        """Set what forward sets beside tensors, in what a call, (args, kwargs), was given and the module has."""
        leaves, start = self._leaves(values), self.out_spec.num_leaves
        for effect in self.effects:
            end = start + effect.spec.num_leaves
            effect.apply(call, leaves[start:end])
            start = end

    def _leaves(self, values: Sequence[Tensor]) -> list[Any]:
        outputs = [o for o in self.outputs if o.kind is OutputKind.OUTPUT]
        wanted = sum(o.node is not None for o in outputs)
        if len(values) != wanted:
            raise ValueError(f"forward returns {wanted} tensors, given {len(values)}")
        rest = iter(values)
        found = [o.constant if o.node is None else _result(o, next(rest)) for o in outputs]
        return [v if o.same is None else found[o.same] for v, o in zip(found, outputs, strict=True)]

    def _check_counts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if len(args) == self.positional and set(kwargs) == set(self.keywords):
            return
        raise TypeError(
            f"traced with {_counts(self.positional, self.keywords)}, called with {_counts(len(args), kwargs)}"
        )


def _result(output: Output, value: Tensor) -> Any:
    return NUMBERS[output.number](value.item()) if output.number else value


def _counts(positional: int, keywords: Any) -> str:
    names = f" ({', '.join(sorted(keywords))})" if keywords else ""
    return f"{positional} positional and {len(keywords)} keyword arguments{names}"


def _check_leaf(leaf: Leaf, value: Any) -> None:
    if leaf.input is not None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{leaf.name} was a tensor when traced, now it is {_shown(value)}")
        return
    # True == 1 == 1.0, but the traced program is not the same for them.
    same = value is leaf.constant or (type(value) is type(leaf.constant) and _equal(value, leaf.constant))
    if not same:
        error = TypeError if type(value) is not type(leaf.constant) else ValueError
        raise error(f"{leaf.name} was {_shown(leaf.constant)} when traced, now it is {_shown(value)}")


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)  # nan is nan


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Traced:
    """A module's program before anything is decided about it."""

    gm: GraphModule
    signature: Signature
