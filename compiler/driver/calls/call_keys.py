"""A call of a module as its program is found by: what of the arguments, modes and parameters counts."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardc.compiler.errors import PlanError
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.user_code import call_site
from shardc.runtime.run.executable import autocast_state


def label(x: Tensor) -> str | None:
    """The placements a DTensor bears; plain tensors bear none."""
    return str(getattr(x, "placements", "")) or None


def global_shape(x: Tensor, layout: Mapping[str, Any], mesh: Mesh) -> tuple[int, ...]:
    """The shape of which a plain tensor is one rank's piece: s rows here are s x w rows in all."""
    shape = list(x.shape)
    if isinstance(x, DTensor):
        return tuple(shape)  # it knows
    for axis, placement in layout.items():
        if getattr(placement, "dim", None) is not None:
            shape[placement.dim] *= mesh[axis]
    return tuple(shape)


def check_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises PlanError where forward cannot be called with these. Hooks may change what forward is given."""
    if module._forward_pre_hooks:
        return
    try:
        signature = inspect.signature(module.forward)
    except ValueError:  # some scripted modules have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise PlanError(
            f"forward of {type(module).__name__} cannot be called so: {error}", help=f"it is forward{signature}"
        ) from None


def held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by FQN, tied ones under every name."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return dict(named)


class Keys:
    """Of calls of one module, which after compile has no other submodules and parameters than before."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._params = [(m._parameters, n) for m in self._modules for n, p in m._parameters.items() if p is not None]

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any], sizes: bool = True) -> tuple:
        """What decides whether two calls share a program; without `sizes`, whether they can be of one family."""
        if not kwargs and all(isinstance(x, Tensor) for x in args):
            leaves, structure = args, len(args)
        else:
            leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        described = tuple(
            (tuple(x.shape) if sizes else x.dim(), x.dtype, x.device, x.requires_grad, label(x))
            if isinstance(x, Tensor)
            else _constant(x)
            for x in leaves
        )
        flags = tuple(m.training for m in self._modules)
        kinds = tuple((p.requires_grad, p.dtype) for p in (table[name] for table, name in self._params))  # pyright: ignore
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), autocast_state()
        return described, structure, flags, kinds, modes


def shapes_of(call: tuple[Any, Any]) -> list[tuple[int, ...]]:
    """Of the tensors among (args, kwargs), in order."""
    return [tuple(x.shape) for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]


def text_key(*parts: Any) -> str:
    """The same in every process for equal parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _holds_tensor(x: Any, seen: set[int]) -> bool:
    """Whether a tensor lies somewhere in an object's attributes, where a program would keep the first call's."""
    if id(x) in seen or isinstance(x, type) or not hasattr(x, "__dict__"):
        return False
    seen.add(id(x))
    leaves = pytree.tree_leaves(dict(vars(x)))
    return any(isinstance(leaf, Tensor) or _holds_tensor(leaf, seen) for leaf in leaves)


def _constant(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        comparable = False
    else:
        comparable = not _holds_tensor(x, set())
    if not comparable:
        raise PlanError(
            f"an input of type {type(x).__name__} is neither a tensor nor a value that can be compared",
            where=call_site(),
            help="pass tensors, numbers, strings, None, or lists, tuples and dicts of them",
        )
    return type(x).__name__, x
