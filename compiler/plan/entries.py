"""What a mesh dim may do for the whole model, beside styles: `Replicated`, `FullyShard`, `ContextParallel`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.layout import bad_option, check_float, counted, placement_code, shown
from shardc.compiler.plan.param_layout import AtRest


class DataEntry:
    """An entry by which each rank of a mesh dim works on its part of the batch: gradients are reduced over it."""

    ignores: ClassVar[str]  # the option for what it leaves alone
    about: tuple[str, ...]  # patterns of the modules that it names
    bucket_mb: float | None = None
    reduce_dtype: torch.dtype | None

    def __repr__(self) -> str:
        """As it would be written, options at their default left out."""
        usual = vars(type(self)())
        options = {k: v for k, v in vars(self).items() if k not in ("about", "modules", "patterns") and v != usual[k]}
        given = [f'"{pattern}"' for pattern in self.about if pattern]
        return f"{type(self).__name__}({', '.join([*given, *(f'{k}={_option(v)}' for k, v in options.items())])})"


@dataclass(frozen=True, init=False, repr=False)
class Replicated(DataEntry):
    """Data parallel over a mesh dim: every rank holds all parameters, and gradients are averaged.

    modules: a pattern, or several, of the modules this is about; "" is the whole model. Gradients of
        parameters outside of them stay local.
    ignored_modules: patterns, or modules, that are left alone: their gradients stay local.
    bucket_mb: gradients are reduced together in buckets of up to this many MiB. One of 1 MiB on CPU (20 elsewhere)
        or more is reduced by itself, where it lies: to copy it would cost more than another message.
    reduce_dtype: what they are cast to on the wire.

    Raises PlanError naming the option that makes no sense.
    """

    ignores = "ignored_modules"
    modules: tuple[str, ...]
    ignored_modules: tuple[str | nn.Module, ...]
    bucket_mb: float | None
    reduce_dtype: torch.dtype | None

    def __init__(
        self,
        modules: str | Iterable[str] = "",
        *,
        ignored_modules: str | nn.Module | Iterable[str | nn.Module] | None = None,
        bucket_mb: float = 25,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        check_megabytes(bucket_mb, "bucket_mb")
        check_float(reduce_dtype, "reduce_dtype")
        named = _several(modules, (str,), "modules of Replicated")
        self.__dict__.update(
            about=named,
            modules=named,
            ignored_modules=_several(ignored_modules, (str, nn.Module), "ignored_modules of Replicated"),
            bucket_mb=bucket_mb,
            reduce_dtype=reduce_dtype,
        )


@dataclass(frozen=True, init=False, repr=False)
class FullyShard(DataEntry):
    """Parameters, gradients and optimizer state split over a mesh dim, gathered unit by unit for computing.

    patterns: each module that matches one is a gather unit; the root takes the rest, or all.
    reshard_after_forward: True frees gathered parameters after forward and gathers them again in
        backward; False keeps them (ZeRO-2); a number keeps them split over so many consecutive ranks.
    placement: function of a parameter -> Shard(d), or None for Shard(0).
    reduce_dtype: what gradients are cast to on the wire.
    ignored_params: parameters, or patterns of their names, left whole on every rank and not reduced.

    Scalars stay whole. Raises PlanError naming the option that makes no sense.
    """

    ignores = "ignored_params"
    patterns: tuple[str, ...]
    reshard_after_forward: bool | int
    reduce_dtype: torch.dtype | None
    placement: Callable[[Any], Shard | None] | None
    ignored_params: tuple[str | nn.Parameter, ...] = field(compare=False)

    def __init__(
        self,
        *patterns: str,
        reshard_after_forward: bool | int = True,
        placement: Callable[[nn.Parameter], Shard | None] | None = None,
        reduce_dtype: torch.dtype | None = None,
        ignored_params: str | nn.Parameter | Iterable[str | nn.Parameter] | None = None,
    ) -> None:
        if not isinstance(reshard_after_forward, int) or reshard_after_forward < 0:
            raise bad_option("reshard_after_forward", reshard_after_forward, "True, False or a number of ranks")
        if placement is not None and not callable(placement):
            raise bad_option("placement", placement, "a function of the parameter that returns Shard(d)")
        check_float(reduce_dtype, "reduce_dtype")
        named = _several(patterns, (str,), "a pattern of FullyShard")
        self.__dict__.update(
            about=("", *named),
            patterns=named,
            reshard_after_forward=reshard_after_forward,
            placement=placement,
            reduce_dtype=reduce_dtype,
            ignored_params=_several(ignored_params, (str, nn.Parameter), "ignored_params of FullyShard"),
        )

    def at_rest(self, name: str, parameter: Tensor, axis: str, size: int) -> AtRest:
        """How a parameter is split over a mesh dim: as the user's function says, or on its first dim.

        Raises PlanError for a placement that does not fit it, and for ranks that `reshard_after_forward` does not.
        """
        chosen = self.placement(parameter) if self.placement else None
        if chosen is not None and not isinstance(chosen, Shard):
            text = placement_code(chosen) if isinstance(chosen, Placement) else shown(chosen)
            help = "return Shard(d) for one of its dims, or None for Shard(0)"
            raise PlanError(f"{self}: placement gives {text} for {name}", help=help)
        placement = counted(chosen or Shard(0), parameter.ndim, name, str(self))
        assert isinstance(placement, Shard)
        return AtRest(placement, self.ways(axis, size), asked=chosen is not None)

    def ways(self, axis: str, size: int) -> bool | int:
        """Over how many ranks parameters stay split between forward and backward: True for all, False for none.

        Raises PlanError for a number that does not divide the ranks.
        """
        after = self.reshard_after_forward
        if isinstance(after, bool):
            return after
        if after < 1 or size % after:
            raise PlanError(
                f"{axis}: reshard_after_forward is {after} ranks, but there are {size}",
                help="reshard_after_forward is True, False or a number that divides them",
            )
        return {1: False, size: True}.get(after, after)


@dataclass(frozen=True, init=False, repr=False)
class ContextParallel(DataEntry):
    """The sequence split over a mesh dim: every rank holds all parameters, and gradients are averaged.

    how: in which way attention meets a split sequence; None for the one that costs least. No other can be asked
        for yet.
    balance: whether ranks are dealt pieces of equal causal work; not reached yet.
    dim: the sequence dim of root inputs. Outputs are split along the dim that it has become, and whole where it is
        gone. An input that has no such dim needs a layout of its own: `compile(..., inputs=...)`.

    Raises PlanError naming the option that makes no sense, or is not reached.
    """

    ignores = "ignored_modules"
    how: str | None
    balance: bool
    dim: int

    def __init__(self, how: str | None = None, *, balance: bool = False, dim: int = 1) -> None:
        if how not in (None, "gather", "heads", "ring"):
            raise bad_option("how", how, '"gather", "heads", "ring" or None')
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
            raise bad_option("dim", dim, "a dim of the inputs, counted from 0")
        self.__dict__.update(
            about=("",), ignored_modules=(), reduce_dtype=None, bucket_mb=25.0, how=how, balance=balance, dim=dim
        )
        for option, asked in (("how", how is not None), ("balance", balance)):
            if asked:
                what = f"{self}: {option} cannot be asked for yet"
                raise PlanError(what, help=f"leave {option} out: attention goes the way that costs least")


def check_megabytes(value: object, option: str) -> None:
    """Raises PlanError unless the value is a positive number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise bad_option(option, value, "a positive number of MiB")


def _several(value: object, kinds: tuple[type, ...], what: str) -> tuple:
    """The value, one of `kinds` or several of them, as a tuple."""
    items = () if value is None else (value,) if isinstance(value, kinds) else value
    items = tuple(items) if isinstance(items, Iterable) else (items,)
    for item in items:
        if not isinstance(item, kinds):
            raise PlanError(f"{what} is {shown(item)}", help="write a pattern, or several of them")
    return items


def _option(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_option, value))}]"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (nn.Module, Tensor)):
        return f"a {type(value).__name__}"
    return getattr(value, "__name__", "...") if callable(value) else str(value)
