"""Steps that localize functions share: sums and extremes over dims that ranks share out among them.

A rank may hold nothing of such a dim: its sum is 0 and its extreme the identity, and counts are global.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from shardc.compiler.rules.site import Site

aten = torch.ops.aten

Dims = Mapping[int, str]  # dims of a tensor, with the factor of each


def two_step(
    op: Any, factors: Collection[str], step: Callable[[Site], Any], fed: Collection[str] = ()
) -> Callable[[Site], Any]:
    """A localize function: `step` where one of the factors is split, else the operator as it is.

    fed: factors that the operator wants some index of; `step` also where a rank has none.
    """

    def localize(site: Site) -> Any:
        if any_split(site, factors) or any(site.split(f) and site.may_be_empty(f) for f in fed):
            return step(site)
        return site.call(op, *site.args, **site.kwargs)

    return localize


def dense(op: Any, at: Collection[int], factors: Collection[str]) -> Callable[[Site], Any]:
    """A localize function for a kernel that reads some arguments, by position, as if they were contiguous:
    a piece of a tensor need not be, where one of the factors is split."""

    def localize(site: Site) -> Any:
        args = packed(site, at) if any_split(site, factors) else site.args
        return site.call(op, *args, **site.kwargs)

    return localize


def packed(site: Site, at: Collection[int]) -> list[Any]:
    """The call's arguments, those at some positions made contiguous."""
    return [site.call(aten.contiguous.default, x) if i in at and x is not None else x for i, x in enumerate(site.args)]


def any_split(site: Site, factors: Collection[str]) -> bool:
    return any(site.split(f) for f in factors)


def get(site: Site, results: Any, i: int) -> Any:
    """One result of an operator that returns several."""
    return site.call(operator.getitem, results, i)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What to add up values of this dtype in: half precision would overflow where the operator does not."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(site: Site, x: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return x if source == target else site.call(aten._to_copy.default, x, dtype=target)


def join(site: Site, x: Any, factors: Collection[str], op: str = "sum") -> Any:
    """A local reduction made complete over those of the factors that are split."""
    for factor in factors:
        if site.split(factor):
            x = site.all_reduce(x, factor, op)
    return x


def local_sum(site: Site, x: Any, dims: Collection[int], keepdim: bool = False) -> Any:
    if not dims:  # which the operator would read as all of them
        return site.call(aten.alias.default, x)
    return site.call(aten.sum.dim_IntList, x, sorted(dims), keepdim)


def total(site: Site, x: Any, dims: Dims, keepdim: bool = True) -> Any:
    """The global sum over some dims."""
    return join(site, local_sum(site, x, dims, keepdim), dims.values())


def joined_sums(site: Site, xs: Sequence[Any], factors: Collection[str]) -> list[Any]:
    """Local sums of one shape, made complete in one collective."""
    if len(xs) < 2 or not any_split(site, factors):
        return [join(site, x, factors) for x in xs]
    both = join(site, site.call(aten.stack.default, list(xs)), factors)
    return [site.call(aten.select.int, both, 0, i) for i in range(len(xs))]


def gathered(site: Site, x: Any, factor: str) -> Any:
    """Every rank's x of one shape side by side, in the order of their indices, in one more dim behind the others:
    one sum, of as many times x as ranks split the factor. The factor is `plain=`."""
    place, ways = site.place(factor), site.ways(factor)
    row = site.call(aten.unsqueeze.default, x, -1)
    return site.all_reduce(site.call(aten.constant_pad_nd.default, row, [place, ways - 1 - place]), factor)


def largest(site: Site, x: Any, rank: int, dims: Dims, dtype: torch.dtype) -> Any:
    """The global maximum over some dims, which are kept with size one."""
    x = filled(site, x, rank, dims, lowest(dtype))
    return join(site, site.call(aten.amax.default, x, sorted(dims), True), dims.values(), "max")


def filled(site: Site, x: Any, rank: int, dims: Dims, value: Any) -> Any:
    """`x` with one more index, of `value`, in every dim that is empty on some rank: an operator that refuses
    an empty dim then takes it, and the result is the same."""
    for d, factor in sorted(dims.items()):
        if site.split(factor) and site.may_be_empty(factor):
            x = site.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1 - d) + [0, 1], value)
    return x


def lowest(dtype: torch.dtype) -> Any:
    """What a maximum over nothing is."""
    if dtype == torch.bool:
        return False
    return -float("inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def highest(dtype: torch.dtype) -> Any:
    """What a minimum over nothing is."""
    if dtype == torch.bool:
        return True
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max
