"""Columns and rows: which dim of which parameter of a module a column- or row-wise style splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.match import Names, join
from shardc.compiler.plan.wishes import Border, Style, Wish

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
SHOWN = 3  # how many names a help line lists


@dataclass(frozen=True)
class Split:
    """How a kind of module is cut.

    `dims`: its parameters, and those of modules inside it, -> the dim that is split, None for one that stays whole.
    `takes` and `gives`: the layouts its arguments `inputs` must have and its result `output` has (an index into a
    tuple, or None for all).
    """

    dims: dict[str, int | None]
    takes: Placement | None = None
    gives: Placement | None = None
    inputs: tuple[int, ...] = (0,)
    output: int | None = None

    def borders(self, style: Style) -> tuple[Border, ...]:
        """What crosses the module's border, where the style may say otherwise."""
        if self.takes is None:
            return style.borders
        takes, gives = style.takes or self.takes, style.gives or self.gives
        ins = (Border("in", i, takes, self.takes, True, style.takes is not None) for i in self.inputs)
        return (*ins, Border("out", self.output, None, gives, style.gives is None, style.gives is not None))


def split_module(names: Names, fqn: str, wish: Wish) -> Split:
    """How a wish cuts this module.

    Raises PlanError where its columns or rows are meant, and it owns no parameters or is of a kind that is not known.
    """
    module, owned = names.modules[fqn], names.owned(fqn)
    assert isinstance(wish.asks, Style)
    if wish.asks.split == "whole":
        return Split(dict.fromkeys(name for name, _ in module.named_parameters(remove_duplicate=False)))
    what = f"{wish.text} names {fqn or 'the model itself'}, a {type(module).__name__}"
    kind = next((make for knows, make in KINDS if knows(module)), None)
    if kind is None and "tensors" in wish.means and _is_weight(module):
        kind = _linear
    if kind is None or not owned:
        raise _not_cut(names, fqn, what)
    try:
        split = kind(module, wish.asks.split == "columns")
    except PlanError as error:
        raise PlanError(f"{what}{error.what}", help=error.help) from None
    if split.dims.get("weight") is not None and "weight" not in owned:
        inner = [n for n in names.parameters if n.startswith(join(fqn, "parametrizations"))]
        raise PlanError(
            f"{what} that computes its weight",
            help=f"give placements to {_listed(inner) or 'its parameters'}",
        )
    return split


def split_parameter(style: Style, ndim: int) -> Placement:
    """The layout of a parameter that is named itself, by a string according to its number of dims."""
    if isinstance(style.split, Placement):
        return style.split
    if style.split not in ("columns", "rows") or ndim == 0:
        return Replicate()
    if style.table:
        return Shard(min(1 if style.split == "columns" else 0, ndim - 1))
    if ndim == 1:  # a bias
        return Shard(0) if style.split == "columns" else Replicate()
    return Shard(ndim - 2 if style.split == "columns" else ndim - 1)


def _features(columns: bool, out_dim: int, in_dim: int, channels: int = -1) -> Split:
    """A weight from features to features; on activations these are the dim `channels`."""
    if columns:
        return Split({"weight": out_dim, "bias": 0}, Replicate(), Shard(channels))
    return Split({"weight": in_dim, "bias": None}, Shard(channels), Replicate())


def _table(module: nn.Module, columns: bool) -> Split:
    return Split({"weight": int(columns)}, Replicate(), Shard(-1) if columns else Replicate())


def _convolution(module: nn.Module, columns: bool) -> Split:
    transposed, groups = isinstance(module, TRANSPOSED), getattr(module, "groups", 1)
    if groups > 1 and columns is transposed:
        raise PlanError(
            f" of {groups} groups, whose weight mixes groups and channels",
            help=f"use {'RowwiseParallel' if transposed else 'ColwiseParallel'}() here",
        )
    channels = -(len(getattr(module, "kernel_size", ())) + 1)
    return _features(columns, int(transposed), int(not transposed), channels)


def _attention(module: nn.Module, columns: bool) -> Split:
    if not columns:
        raise PlanError(
            ", which has no rows: it is several matrices",
            help="ColwiseParallel() splits its heads, and its out_proj by rows",
        )
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    dims: dict[str, int | None] = {**dict.fromkeys(names, 0), "bias_k": 2, "bias_v": 2}
    dims |= {"out_proj.weight": 1, "out_proj.bias": None}
    return Split(dims, Replicate(), Replicate(), inputs=(0, 1, 2), output=0)


def _is_swapped_linear(module: nn.Module) -> bool:
    """transformers' Conv1D: a Linear whose weight is (in, out)."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and _is_weight(module, 1)


def _is_weight(module: nn.Module, features: int = 0) -> bool:
    """A class of its own around one matrix, such as a router, and perhaps its bias: strings mean a Linear by it."""
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if weight is None or weight.ndim != 2 or own:
        return False
    return bias is None or tuple(bias.shape) == (weight.shape[features],)


def _weight_is(module: nn.Module, *attributes: str) -> bool:
    """Of another class, but with these names for the sizes of its weight."""
    weight = getattr(module, "weight", None)
    sizes = tuple(getattr(module, name, None) for name in attributes)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == sizes


def _linear(module: nn.Module, columns: bool) -> Split:
    return _features(columns, 0, 1)


KINDS: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module, bool], Split]], ...] = (
    (lambda m: isinstance(m, nn.MultiheadAttention), _attention),
    (lambda m: isinstance(m, (*CONVS, *TRANSPOSED)), _convolution),
    (_is_swapped_linear, lambda m, columns: _features(columns, 1, 0)),
    (lambda m: isinstance(m, nn.Linear) or _weight_is(m, "out_features", "in_features"), _linear),
    (lambda m: isinstance(m, TABLES) or _weight_is(m, "num_embeddings", "embedding_dim"), _table),
)


def _not_cut(names: Names, fqn: str, what: str) -> PlanError:
    module = names.modules[fqn]
    below = [join(fqn, n) for n, m in module.named_modules() if n and any(knows(m) for knows, _ in KINDS)]
    below = [n for n in below if not any(n.startswith(outer + ".") for outer in below)]
    if not names.owned(fqn) and below:
        return PlanError(
            f"{what} with no parameters of its own",
            help=f"name modules inside it: {_listed(below)}",
        )
    if not any(True for _ in module.parameters()):
        return PlanError(
            f"{what}, which has no parameters to split",
            help="leave it out, or lay out what passes through it with PrepareModuleInputOutput",
        )
    inside = [join(fqn, n) for n, p in module.named_parameters() if p.ndim > 0]
    return PlanError(
        f"{what}, whose columns and rows are not known",
        help=f"give its parameters placements, such as Shard(0): {_listed(inside)}",
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
