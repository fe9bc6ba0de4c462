"""Operators that read or write where other tensors say: gather, scatter, advanced indexing, search.

A dim that is looked up in is whole, except where a lookup out of a rank's rows can be masked: gather from a
split dim gives each rank what it has, zero for the rest, a pending sum; scatter_add into one skips the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import apart, broadcast, dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

# -- along one dim ---------------------------------------------------------------------------------


def _aligned(dim: int, along: Sequence[str], *tensors: Any) -> tuple[list[list[str]], list[str]]:
    """Each tensor's names, `along` being those at `dim`, and the names that must be whole.

    A dim in which one tensor is larger is read only in part, from the start.
    """
    out: list[list[str]] = [[] for _ in tensors]
    whole: list[str] = []
    for d in range(tensors[0].dim()):
        sizes = {t.shape[d] for t in tensors}
        for i, names in enumerate(out):
            names.append(f"d{d}" if len(sizes) == 1 else f"{'xyz'[i]}{d}")
        whole += [names[d] for names in out] if len(sizes) > 1 and d != dim % len(tensors[0].shape) else []
    for names, name in zip(out, along, strict=True):
        names[dim] = name
    return out, whole


def _here(site: Site, index: Any) -> tuple[Any, Any]:
    """The index counted from this rank's first row, 0 where it points elsewhere, and where it points here."""
    moved = site.call(aten.sub.Scalar, index, site.start("v"))
    low, high = site.call(aten.ge.Scalar, moved, 0), site.call(aten.lt.Scalar, moved, site.size("v"))
    here = site.call(aten.logical_and.default, low, high)
    return site.call(aten.mul.Tensor, moved, here), here


def _filled(site: Site, x: Any, here: Any) -> Any:
    """x with zeros where the index points elsewhere."""
    return site.call(aten.masked_fill.Scalar, x, site.call(aten.logical_not.default, here), 0)


def _with_a_row(site: Site, x: Any, rank: int, dim: int) -> Any:
    """x with one more row along dim if some rank has none: index 0 must point at something."""
    if not site.may_be_empty("v"):
        return x
    return site.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1 - dim % rank) + [0, 1], 0)


@rule(aten.gather.default)
def _(x: Any, dim: int, index: Any, *, results: Any, sparse_grad: bool = False) -> OpRule:
    if x.dim() == 0 or index.dim() != x.dim():  # an empty index may have any rank
        return apart([x, index], results, linear="0")
    (source, where), whole = _aligned(dim, "vk", x, index)

    def local(site: Site) -> Any:
        values, at = site.args[0], site.args[2]
        if not site.split("v"):
            return site.call(aten.gather.default, values, dim, at)
        at, here = _here(site, at)
        found = site.call(aten.gather.default, _with_a_row(site, values, x.dim(), dim), dim, at)
        return _filled(site, found, here)

    text = line([source, where], [where])
    if x.dtype == torch.bool:  # zeros of other ranks are added, and bools are not
        return parse(text, whole=" ".join(["v", *whole]))
    return parse(text, whole=" ".join(whole), sum="v", plain="v", linear="0", localize=local)


@rule(aten.scatter_add.default)
def _(x: Any, dim: int, index: Any, source: Any, *, results: Any) -> OpRule:
    if x.dim() == 0 or index.dim() != x.dim() or index.shape != source.shape:
        return apart([x, index, source], results, linear="0 2")
    (into, where, same), whole = _aligned(dim, "vkk", x, index, source)

    def local(site: Site) -> Any:
        values, at, added = site.args[0], site.args[2], site.args[3]
        if not site.split("v"):
            return site.call(aten.scatter_add.default, values, dim, at, added)
        at, here = _here(site, at)
        room = _with_a_row(site, values, x.dim(), dim)
        out = site.call(aten.scatter_add.default, room, dim, at, _filled(site, added, here))
        return site.call(aten.slice.Tensor, out, dim, 0, site.size("v"))

    return parse(
        line([into, where, same], [into]), whole=" ".join(whole), plain="v", sum="k", linear="0 2", once="0",
        localize=local,
    )  # fmt: skip


# Whichever of several values wins a place, a sum of such choices is none of them: not linear.
@rule(aten.scatter.src)
@rule(aten.scatter.value)
@rule(aten.scatter.reduce)
@rule(aten.scatter.value_reduce)
@rule(aten.scatter_reduce.two)
def _(x: Any, dim: int, index: Any, source: Any, *rest: Any, results: Any, **options: Any) -> OpRule:
    tensors = tensors_in([x, index, source])
    if any(t.dim() == 0 for t in tensors):
        return apart(tensors, results)
    lists, whole = _aligned(dim, "vks"[: len(tensors)], *tensors)
    return parse(line(lists, lists[:1]), whole=" ".join(["v", "k", "s"[: len(tensors) - 2], *whole]))


def _rows(linear: str) -> Any:
    """Rows of x along dim chosen by a list of numbers, and as many rows of a source, if there is one."""

    def build(x: Any, dim: int, index: Any, *source: Any, results: Any, **options: Any) -> OpRule:
        tensors = [x, index, *tensors_in(source)]
        if x.dim() == 0 or index.dim() == 0:
            return apart(tensors, results)
        sources = [dims(t.dim(), {dim: "k"} if t.dim() else {}) for t in tensors[2:]]
        into = dims(x.dim(), {dim: "v"})
        return parse(line([into, ["k"], *sources], [into]), whole="v k", linear=linear)

    return build


@rule(aten.index_add.default)
def _(x: Any, dim: int, index: Any, source: Any, *, results: Any, **options: Any) -> OpRule:
    """Each rank adds its own rows of the source."""
    tensors = [x, index, source]
    if any(t.dim() == 0 for t in tensors):
        return apart(tensors, results, linear="0 2")
    into, added = dims(x.dim(), {dim: "v"}), dims(x.dim(), {dim: "k"})
    return parse(line([into, ["k"], added], [into]), whole="v", sum="k", linear="0 2", once="0")


rule(aten.index_copy.default)(_rows(""))
rule(aten.index_fill.int_Tensor)(_rows("0 2"))
rule(aten.index_fill.int_Scalar)(_rows(""))
rule(aten.index_reduce.default)(_rows(""))


@rule(aten.index_select.default)
def _(x: Any, dim: int, index: Any, *, results: Any) -> OpRule:
    if x.dim() == 0 or index.dim() == 0:
        return apart([x, index], results, linear="0")
    taken = dims(x.dim(), {dim: "k"})
    return parse(line([dims(x.dim(), {dim: "v"}), ["k"]], [taken]), whole="v", linear="0")


@rule(aten.take.default)
def _(x: Any, index: Any, *, results: Any) -> OpRule:
    names = [f"v{i}" for i in range(x.dim())]
    return parse(line([names, ["..."]], [["..."]]), whole=" ".join(names), linear="0")


# -- advanced indexing -----------------------------------------------------------------------------


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _indexed(x: Any, indices: Sequence[Any]) -> tuple[list[str], list[list[str]], list[str], list[int]]:
    """Names of x, of each index and of `x[indices]`, and the latter's shape.

    The indices are broadcast together; their dims stand where the indexed ones stood if those are
    neighbours, else in front.
    """
    at = [i for i, index in enumerate(indices) if index is not None]
    common = torch.broadcast_shapes(*(indices[i].shape for i in at))
    names = [f"v{d}" if d in at else f"d{d}" for d in range(x.dim())]
    looked = [f"b{i}" for i in range(len(common))]
    lists = [broadcast(indices[i].shape, common, looked) for i in at]
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    free = [d for d in range(x.dim()) if d not in at]
    head, tail = free[:place], free[place:]
    taken = [*(names[d] for d in head), *looked, *(names[d] for d in tail)]
    shape = [*(x.shape[d] for d in head), *common, *(x.shape[d] for d in tail)]
    return names, lists, taken, shape


@rule(aten.index.Tensor)
@rule(aten._unsafe_index.Tensor)
def _(x: Any, indices: Sequence[Any], *, results: Any) -> OpRule:
    if any(_is_mask(i) for i in indices) or not tensors_in(indices):
        return apart(tensors_in([x, indices]), results)
    names, lists, taken, _ = _indexed(x, indices)
    whole = " ".join(n for n in names if n.startswith("v"))
    return parse(line([names, *lists], [taken]), whole=whole, linear="0")


@rule(aten.index_put.default)
@rule(aten._unsafe_index_put.default)
def _(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False, *, results: Any) -> OpRule:
    """Linear only where values add up: of several values for one place, any may win."""
    tensors = tensors_in([x, indices, values])
    if _is_mask(indices[0]) and len(tensors) == 3 and values.numel() == 1:
        return _put_masked(x.dim(), indices[0].dim(), values.dim())
    if any(_is_mask(i) for i in indices) or len(tensors) == 2:
        return apart(tensors, results)
    names, lists, taken, shape = _indexed(x, indices)
    put = broadcast(values.shape, shape, taken)
    found = {n[0]: set[str]() for n in ("v", "b")}
    for name in (name for names in (names, *lists, put) for name in names if name[0] in found):
        found[name[0]].add(name)
    text, looked_up, rows = line([names, *lists, put], [names]), *(" ".join(sorted(found[n])) for n in found)
    if not accumulate:
        return parse(text, whole=f"{looked_up} {rows}")
    return parse(text, whole=looked_up, sum=rows, linear=f"0 {len(tensors) - 1}", once="0")


def _put_masked(rank: int, mask: int, value: int) -> OpRule:
    """One number put wherever the mask says: a pointwise choice."""
    names = dims(rank)
    return parse(line([names, names[:mask], ["1"] * value], [names]))


# -- search ----------------------------------------------------------------------------------------

rule(aten.bucketize.Tensor, "..., v -> ...", whole="v")
rule(aten.isin.Tensor_Scalar, "... -> ...")


@rule(aten.isin.Tensor_Tensor)
def _(x: Any, among: Any, *, results: Any, **options: Any) -> OpRule:
    names = [f"v{i}" for i in range(among.dim())]
    return parse(line([["..."], names], [["..."]]), whole=" ".join(names))


@rule(aten.searchsorted.Tensor)
def _(row: Any, x: Any, *, results: Any, **options: Any) -> OpRule:
    """Numbers sought in one sorted row, or each in the row of its own leading dims."""
    rows = [row, *tensors_in(options)]
    if row.dim() == 1:
        return parse(f"v, ...{', v' * (len(rows) - 1)} -> ...", whole="v")
    return parse(f"... v, ... n{', ... v' * (len(rows) - 1)} -> ... n", whole="v")
