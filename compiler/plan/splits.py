"""Columns and rows: which dim of which parameter of a module a column- or row-wise style splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.match import Index, join
from shardc.compiler.plan.styles import Style

Cut = Literal["columns", "rows"]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SHOWN = 3  # how many names a help line lists


@dataclass(frozen=True)
class Split:
    """How a kind of module is cut.

    `dims`: its parameters -> the dim that is split, None for one that stays whole. `inner`: the same for
    a child's parameters, which a style of the child's own may overrule. `takes` and `gives`: the layouts
    its arguments `inputs` must have and its result `output` has (an index into a tuple, or None for all).
    """

    dims: dict[str, int | None]
    takes: Placement
    gives: Placement
    inner: tuple[tuple[str, int | None], ...] = ()
    inputs: tuple[int, ...] = (0,)
    output: int | None = None


def cut(index: Index, fqn: str, style: Style, place: str) -> Split:
    """How the style cuts this module.

    Raises PlanError where the module owns no parameters, or is of a kind whose columns are not known.
    """
    module = index.modules[fqn]
    columns = style.split == "columns"
    kind = next((make for knows, make in KINDS if knows(module)), None)
    if kind is None and style.named and _is_weight(module):
        kind = _linear
    owned = index.owned(fqn)
    if kind is None or not owned:
        raise _not_cut(index, fqn, place)
    split = kind(module, columns, f"{place} names {_called(fqn)}, a {type(module).__name__}")
    missing = [n for n, dim in split.dims.items() if n == "weight" and dim is not None and n not in owned]
    if missing:
        inner = [n for n in index.parameters if n.startswith(join(fqn, "parametrizations"))]
        raise PlanError(
            f"{place} names {_called(fqn)}, a {type(module).__name__} that computes its weight",
            help=f"give placements to {_listed(inner) or 'its parameters'}",
        )
    return split


def cut_parameter(style: Style, ndim: int) -> Placement:
    """The layout of a parameter that a string names itself, by its number of dims."""
    if style.split not in ("columns", "rows") or ndim == 0:
        return Replicate()
    if style.table:
        return Shard(min(1 if style.split == "columns" else 0, ndim - 1))
    if ndim == 1:  # a bias
        return Shard(0) if style.split == "columns" else Replicate()
    return Shard(ndim - 2 if style.split == "columns" else ndim - 1)


def _linear(module: nn.Module, columns: bool, what: str) -> Split:
    return _features(columns, out_dim=0, in_dim=1)


def _swapped_linear(module: nn.Module, columns: bool, what: str) -> Split:
    return _features(columns, out_dim=1, in_dim=0)


def _features(columns: bool, out_dim: int, in_dim: int, channels: int = -1) -> Split:
    """A weight from features to features; on activations these are the dim `channels`."""
    if columns:
        return Split({"weight": out_dim, "bias": 0}, Replicate(), Shard(channels))
    return Split({"weight": in_dim, "bias": None}, Shard(channels), Replicate())


def _table(module: nn.Module, columns: bool, what: str) -> Split:
    return Split({"weight": int(columns)}, Replicate(), Shard(-1) if columns else Replicate())


def _convolution(module: nn.Module, columns: bool, what: str) -> Split:
    transposed, groups = isinstance(module, TRANSPOSED), getattr(module, "groups", 1)
    if groups > 1 and columns is transposed:
        raise PlanError(
            f"{what} of {groups} groups, whose weight mixes groups and channels",
            help=f"use {'RowwiseParallel' if transposed else 'ColwiseParallel'}() here",
        )
    channels = -(len(getattr(module, "kernel_size", ())) + 1)
    return _features(columns, int(transposed), int(not transposed), channels)


def _attention(module: nn.Module, columns: bool, what: str) -> Split:
    if not columns:
        raise PlanError(
            f"{what}, which has no rows: it is several matrices",
            help="ColwiseParallel() splits its heads, and its out_proj by rows",
        )
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    dims: dict[str, int | None] = {**dict.fromkeys(names, 0), "bias_k": 2, "bias_v": 2}
    inner = (("out_proj.weight", 1), ("out_proj.bias", None))
    return Split(dims, Replicate(), Replicate(), inner, inputs=(0, 1, 2), output=0)


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or another class with its names and the same shape of weight."""
    return isinstance(module, nn.Linear) or _weight_is(module, "out_features", "in_features")


def _is_swapped_linear(module: nn.Module) -> bool:
    """transformers' Conv1D: a Linear whose weight is (in, out)."""
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not named or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return False
    return bias is None or tuple(bias.shape) == (weight.shape[1],)


def _is_table(module: nn.Module) -> bool:
    is_one = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    return is_one or _weight_is(module, "num_embeddings", "embedding_dim")


def _weight_is(module: nn.Module, *attributes: str) -> bool:
    weight = getattr(module, "weight", None)
    sizes = tuple(getattr(module, name, None) for name in attributes)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == sizes


def _is_weight(module: nn.Module) -> bool:
    """A class of its own around one matrix, such as a router: strings mean a Linear by it."""
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.ndim != 2 or not set(own) <= {"weight", "bias"}:
        return False
    return bias is None or tuple(bias.shape) == (weight.shape[0],)


KINDS: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module, bool, str], Split]], ...] = (
    (lambda m: isinstance(m, nn.MultiheadAttention), _attention),
    (lambda m: isinstance(m, (*CONVS, *TRANSPOSED)), _convolution),
    (_is_swapped_linear, _swapped_linear),
    (_is_linear, _linear),
    (_is_table, _table),
)


def _not_cut(index: Index, fqn: str, place: str) -> PlanError:
    module, owned = index.modules[fqn], index.owned(fqn)
    what = f"{place} names {_called(fqn)}, a {type(module).__name__}"
    below = [join(fqn, n) for n, m in module.named_modules() if n and any(knows(m) for knows, _ in KINDS)]
    below = [n for n in below if not any(n.startswith(outer + ".") for outer in below)]
    if not owned and below:
        return PlanError(
            f"{what} with no parameters of its own",
            help=f"name modules inside it: {_listed(below)}",
        )
    if not any(True for _ in module.parameters()):
        return PlanError(
            f"{what}, which has no parameters to split",
            help="leave it out, or lay out what passes through it with PrepareModuleInputOutput",
        )
    names = [join(fqn, n) for n, p in module.named_parameters() if p.ndim > 0]
    return PlanError(
        f"{what}, whose columns and rows are not known",
        help=f"give its parameters placements, such as Shard(0): {_listed(names)}",
    )


def _called(fqn: str) -> str:
    return fqn or "the model itself"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
