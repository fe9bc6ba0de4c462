"""Embedding tables: features and indices are free; with split rows each rank looks up the rows it owns.

The result is then pending, and a row that another rank owns adds exactly zero; an index that no rank owns is torch's
IndexError. The gradient of a table
has all rows, pending over the split indices.
"""

from __future__ import annotations

from typing import Any

import torch

from shardc.compiler.rules.notation import apart, dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import filled
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten


def _look_up(site: Site) -> Any:
    """Neither padding_idx nor the other arguments matter to the forward."""
    table, indices = site.args[:2]
    if not site.split("v"):
        return site.call(aten.embedding.default, *site.args, **site.kwargs)
    here = site.call(aten.sub.Scalar, indices, site.start("v"))
    foreign = site.call(aten.lt.Scalar, here, 0)
    foreign = site.call(aten.logical_or.default, foreign, site.call(aten.ge.Scalar, here, site.size("v")))
    # an index that no rank owns stays out of range: torch refuses it on every rank, as on one device
    strange = site.call(aten.logical_or.default, site.call(aten.lt.Scalar, indices, 0), _beyond(site, indices))
    others = site.call(aten.logical_and.default, foreign, site.call(aten.logical_not.default, strange))
    rows = site.call(aten.masked_fill.Scalar, here, others, 0)
    found = site.call(aten.embedding.default, filled(site, table, 2, {0: "v"}, 0), rows)
    foreign = site.call(aten.unsqueeze.default, foreign, -1)
    return site.call(aten.masked_fill.Scalar, found, foreign, 0)


def _beyond(site: Site, indices: Any) -> Any:
    return site.call(aten.ge.Scalar, indices, site.full("v"))


rule(aten.embedding.default, "v d, ... -> ... d", sum="v", plain="v", linear="0", localize=_look_up)


@rule(aten.embedding_dense_backward.default)
def _(grad: Any, indices: Any, rows: int, padding_idx: int, scale_grad_by_freq: bool, *, results: Any) -> OpRule:
    names = dims(indices.dim())
    # how often an index occurs is known only to a rank that sees all of them
    whole, summed = (names, []) if scale_grad_by_freq else ([], names)
    text = line([[*names, "d"], names], [["v", "d"]])
    return parse(text, sum=" ".join(summed), whole=" ".join(["v", *whole]), linear="0")


# -- bags: a run of indices may lie anywhere, so that only the features are free ---------------------


def _bags(operands: list[Any], results: list[Any], features: int, **options: Any) -> OpRule:
    """Of a matrix whose rows are features, the features are `d`; all other dims are whole."""

    def names(side: str, i: int, t: Any) -> list[str]:
        matrix = t.dim() == 2 and t.shape[1] == features
        return [f"{side}{i}", "d"] if matrix else [f"{side}{i}.{k}" for k in range(t.dim())]

    left = [names("x", i, t) for i, t in enumerate(operands)]
    right = [names("y", i, t) for i, t in enumerate(results)]
    whole = {n: None for tensor in (*left, *right) for n in tensor if n != "d"}
    return parse(line(left, right), whole=" ".join(whole), joined="d", **options)


@rule(aten._embedding_bag.default)
@rule(aten._embedding_bag_forward_only.default)
def _(table: Any, *rest: Any, results: Any, **options: Any) -> OpRule:
    return _bags([table, *tensors_in(*rest, options)], results, table.shape[1])


@rule(aten._embedding_bag_dense_backward.default)
def _(grad: Any, *rest: Any, results: Any, **options: Any) -> OpRule:
    return _bags([grad, *tensors_in(*rest, options)], results, grad.shape[1], linear="0")


@rule(aten._embedding_bag_per_sample_weights_backward.default)
def _(*args: Any, results: Any, **options: Any) -> OpRule:
    return apart(tensors_in(args, options), results, linear="0")
