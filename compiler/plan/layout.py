"""How users write layouts and dtypes: placements, `Layout` over named mesh dims, `Precision`, and their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardc.compiler.errors import PlanError
from shardc.compiler.ir.marks import parse_placement, placement_text
from shardc.compiler.plan.match import did_you_mean

PLACEMENTS = (Shard, Replicate, Partial, _StridedShard)


@dataclass(frozen=True, init=False)
class Layout:
    """A layout over named mesh dims: `Layout(dp=Shard(0), tp=Shard(1))`; mesh dims not named replicate.

    Several mesh dims on one tensor dim nest in the order of the mesh. Raises PlanError for a value that
    is no torch placement.
    """

    entries: tuple[tuple[str, Placement], ...]

    def __init__(self, **placements: Placement) -> None:
        for axis, placement in placements.items():
            if not isinstance(placement, PLACEMENTS):
                raise PlanError(
                    f"Layout has {axis}={shown(placement)}",
                    help="write a torch placement: Shard(dim), Replicate() or Partial()",
                )
        object.__setattr__(self, "entries", tuple(sorted(placements.items())))

    @property
    def placements(self) -> dict[str, Placement]:
        """Mesh dim -> placement."""
        return dict(self.entries)

    def to_text(self) -> str:
        """Stable text, such as `dp=S(0) tp=R`."""
        return " ".join(f"{axis}={placement_text(p)}" for axis, p in self.entries)

    @classmethod
    def from_text(cls, text: str) -> Layout:
        """The layout whose `to_text` this is. Raises ValueError for other text."""
        found = re.findall(r"(\w+)=(\w+(?:\([^()]*\))?)", text)
        layout = cls(**{axis: parse_placement(placement) for axis, placement in found})
        if layout.to_text() != text:
            raise ValueError(f"no layout reads {text!r}")
        return layout

    def __repr__(self) -> str:
        return f"Layout({', '.join(f'{axis}={placement_code(p)}' for axis, p in self.entries)})"


@dataclass(frozen=True)
class Precision:
    """What is computed in which dtype; None leaves a tensor as it is.

    param: parameters and floating-point inputs while computing; the stored ones keep their dtype.
    reduce: gradients on the wire. output: floating-point outputs.

    Raises PlanError for what is no floating-point dtype.
    """

    param: torch.dtype | None = None
    reduce: torch.dtype | None = None
    output: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("param", "reduce", "output"):
            check_float(getattr(self, name), f"{name} of Precision")


def as_layout(value: object, names: tuple[str, ...], what: str) -> dict[str, Placement]:
    """Mesh dim -> placement of a torch placement (for the only mesh dim) or a `Layout`, in mesh order.

    `what` says where it was given. Raises PlanError for another value, for unknown mesh dims, and for a
    bare placement where the mesh has several dims.
    """
    if isinstance(value, Layout):
        for axis in value.placements:
            if axis not in names:
                raise unknown_mesh_dim(axis, names, what)
        return {axis: value.placements[axis] for axis in names if axis in value.placements}
    if not isinstance(value, PLACEMENTS):
        raise PlanError(
            f"{what} is {shown(value)}, which is no layout",
            help="a layout is a torch placement, or Layout(dp=Shard(0), ...) by mesh dim",
        )
    if len(names) != 1:
        help = f"write Layout({names[-1] if names else 'tp'}={placement_code(value)})"
        raise PlanError(f"{what} is {placement_code(value)}, but the mesh has {', '.join(names)}", help=help)
    return {names[0]: value}


def unknown_mesh_dim(axis: str, names: tuple[str, ...], what: str) -> PlanError:
    """The error for a mesh dim that the mesh does not have."""
    return PlanError(
        f"{what} names the mesh dim {axis}, but the mesh has {', '.join(names) or 'none'}",
        help=did_you_mean(axis, names),
    )


def placement_code(placement: Placement) -> str:
    """A placement as it would be written: `Shard(0)`, `Replicate()`, `Partial("max")`."""
    if isinstance(placement, _StridedShard):
        return f"_StridedShard({placement.dim}, split_factor={placement.split_factor})"
    if isinstance(placement, Shard):
        return f"Shard({placement.dim})"
    if isinstance(placement, Partial):
        return "Partial()" if placement.reduce_op == "sum" else f'Partial("{placement.reduce_op}")'
    return "Replicate()"


def shown(value: object) -> str:
    """A value in an error message, kept short."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text and " at 0x" not in text else f"a {type(value).__name__}"


def counted(placement: Placement, ndim: int, what: str, excerpt: str = "") -> Placement:
    """The placement with its dim counted from the front. PlanError where `what`, of so many dims, has no such dim."""
    dim = getattr(placement, "dim", None)
    if dim is None:
        return placement
    if not -ndim <= dim < ndim:
        help = "name one of its dims" if ndim else "leave a scalar whole: Replicate()"
        raise PlanError(f"{what} is split on dim {dim}, but has {ndim} dims", excerpt=excerpt, help=help)
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim % ndim, split_factor=placement.split_factor)
    return Shard(dim % ndim)


def check_float(value: object, option: str) -> None:
    """Raises PlanError unless the value is None or a floating-point dtype."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise bad_option(option, value, "a floating-point dtype, such as torch.bfloat16")


def bad_option(option: str, value: object, wanted: str) -> PlanError:
    """The error for an option with a value that makes no sense."""
    return PlanError(f"{option} is {shown(value)}", help=f"{option} is {wanted}")
