"""Operators that work along one dim, which stays whole: sorting, selection, running sums. Others are free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardc.compiler.rules.names import dims, line
from shardc.compiler.rules.reduce import reduced, reduction
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten

# operator -> where its dim stands among the arguments
ALONG = {
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.mode.default: 1,
    aten.median.dim: 1,
    aten.nanmedian.dim: 1,
    aten.kthvalue.default: 2,
    aten.topk.default: 2,
    aten.cumsum.default: 1,
    aten.cumprod.default: 1,
    aten.logcumsumexp.default: 1,
    aten.cummax.default: 1,
    aten.cummin.default: 1,
}
LINEAR = (aten.cumsum.default,)


def along(x: Any, dim: int, results: Any, **options: Any) -> OpRule:
    """`d0 n -> d0 k`: the dim may have another size in the results, or be gone from them."""
    at = list(reduced(x, dim))
    left, right = dims(x.dim(), dict.fromkeys(at, "n")), dims(x.dim(), dict.fromkeys(at, "k"))
    if results[0].dim() < x.dim():
        right.remove("k")
    whole = " ".join({n: None for n in (*left, *right) if n in ("n", "k")})
    return parse(line([left], [right] * len(results)), whole=whole, **options)


def _build(at: int, linear: str) -> Callable[..., OpRule]:
    def build(x: Any, *args: Any, results: Any, **kwargs: Any) -> OpRule:
        dim = args[at - 1] if len(args) >= at else kwargs.get("dim", -1)
        return along(x, dim, results, linear=linear)

    return build


for _op, _at in ALONG.items():
    rule(_op)(_build(_at, "0" if _op in LINEAR else ""))


@rule(aten.median.default)
@rule(aten.nanmedian.default)
def _(x: Any, *, results: Any) -> OpRule:
    return reduction(x, reduced(x, None), whole="{gone}")
