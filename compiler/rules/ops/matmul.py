"""Products: of matrices, batches of them, vectors, with and without something added.

A product passes a sum that one of its factors holds pending. Where something is added, the contracted
dim stays whole: every rank would add it. (Written as a product and an add it may be split.)
"""

from __future__ import annotations

from typing import Any

import torch

from shardc.compiler.rules.notation import apart, broadcast, line
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

rule(aten.mm.default, "m k, k n -> m n", sum="k", linear="0 | 1")
rule(aten._int_mm.default, "m k, k n -> m n", sum="k", linear="0 | 1")
rule(aten.bmm.default, "b m k, b k n -> b m n", sum="k", linear="0 | 1")
rule(aten.mv.default, "m k, k -> m", sum="k", linear="0 | 1")
rule(aten.dot.default, "k, k -> _", sum="k", linear="0 | 1")
rule(aten.vdot.default, "k, k -> _", sum="k", linear="0 | 1")
rule(aten.ger.default, "m, n -> m n", linear="0 | 1")

# What is added may be stretched to the result; addmv itself does so wrongly where the result is empty.
ADDED = {
    "addmm": ("m k, k n -> m n", "k"),
    "addmv": ("m k, k -> m", "k"),
    "addr": ("m, n -> m n", ""),
    "baddbmm": ("b m k, b k n -> b m n", "k"),
    "addbmm": ("b m k, b k n -> m n", "b k"),
}


def _added(op: Any, product: str, whole: str) -> None:
    names = product.split(" -> ")[1].split()

    def build(added: Any, *factors: Any, results: Any, **kwargs: Any) -> OpRule:
        first = broadcast(added.shape, results[0].shape, names)
        nonempty = "m" if op is aten.addmv.default and first != names else ""
        text = f"{' '.join(first) or '_'}, {product}"
        return parse(text, whole=whole, nonempty=nonempty, linear="0 1 | 0 2")

    rule(op)(build)


for _name, (_product, _whole) in ADDED.items():
    _added(getattr(aten, _name).default, _product, _whole)


@rule(aten.linalg_cross.default)
def _(a: Any, b: Any, *, dim: int = -1, results: Any) -> OpRule:
    shape = results[0].shape
    names = [f"d{i}" for i in range(len(shape))]
    text = line([broadcast(t.shape, shape, names) for t in (a, b)], [names])
    return parse(text, whole=names[dim], linear="0 | 1")


@rule(aten._cdist_forward.default)
def _(a: Any, b: Any, p: float, mode: Any, *, results: Any) -> OpRule:
    """Distances of all rows of one to all rows of the other."""
    if a.shape[:-2] != b.shape[:-2]:
        return apart([a, b], results)
    return parse("... m k, ... n k -> ... m n", whole="k")
