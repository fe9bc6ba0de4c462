"""Convolutions: batch and output channels free, input channels contracted, groups split whole.

A spatial dim may be split over one mesh dim, at any stride and dilation, as it is and transposed, forward and
backward: each rank fetches the rows around its own that its results need (`windows.py`). An operator without output
channels is no convolution: channels are split only where each rank has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import line
from shardc.compiler.rules.ops.images.windows import Windows
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import get
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


class _Call:
    """The dims of one convolution; i and o are the channels within a group."""

    def __init__(self, weight: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, groups: int) -> None:
        sides = ("y", "x") if transposed else ("x", "y")
        self.windows = Windows(weight.shape[2:], stride, padding, dilation, *sides)
        kernel = self.windows.names("k")
        self.bias = ["(g o)" if groups > 1 else "o"]
        channels = "(g i)" if groups > 1 else "i"
        self.input, self.output = (
            ["b", *names, *self.windows.names(side)] for side, names in (("x", [channels]), ("y", self.bias))
        )
        self.weight = [channels, "o", *kernel] if transposed else [*self.bias, "i", *kernel]
        self.split_groups, self.rows = groups > 1, self.windows.options()["plain"]
        self.options: dict[str, Any] = {
            "whole": " ".join(kernel),
            "nonempty": "g o i" if groups > 1 else "o i",
            "sizes": {"g": groups} if groups > 1 else None,
            **self.windows.options(),
        }

    def groups(self, site: Site, given: int) -> Any:
        return site.size("g") if self.split_groups else given


@rule(aten.convolution.default)
def _(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *, results: Any,
) -> OpRule:  # fmt: skip
    call = _Call(weight, stride, padding, dilation, transposed, groups)
    windows, sizes = call.windows, (x.shape[2:], results[0].shape[2:])

    def convolved(site: Site, added: Any) -> Any:
        local, w, _, *how, given = site.args
        rows, many = windows.split(site), call.groups(site, given)
        if rows and transposed:
            return windows.spread(site, local, w, added, many, rows, sizes)
        how[1] = windows.left(rows)
        near = windows.around(site, local, 2, rows)
        return windows.without_spare(site, site.call(aten.convolution.default, near, w, added, *how, many), 2, rows)

    def localize(site: Site) -> Any:
        if bias is None or not site.split("i"):
            return convolved(site, site.args[2])
        # each rank would add the bias to its summand
        y = site.all_reduce(convolved(site, None), "i")
        shape = [1, site.result_shape()[1], *([1] * (weight.dim() - 2))]
        return site.call(aten.add.Tensor, y, site.call(aten.view.default, site.args[2], shape))

    operands = [call.input, call.weight, *([call.bias] if bias is not None else [])]
    how = {"sum": "i", "linear": "0 | 1"} if bias is None else {"joined": "i", "linear": "0 2 | 1 2"}
    return parse(line(operands, [call.output]), localize=localize, **how, **call.options)


@rule(aten.convolution_backward.default)
def _(
    grad: Any, x: Any, weight: Any, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: Sequence[bool], *, results: Any,
) -> OpRule:  # fmt: skip
    call, op = _Call(weight, stride, padding, dilation, transposed, groups), aten.convolution_backward.default
    windows, sizes = call.windows, (grad.shape[2:], x.shape[2:])

    def localize(site: Site) -> Any:
        g, local, w, bias, *how, given, mask = site.args
        bias = None if bias is None else [site.operand_shape(0)[1]]
        rows, many = windows.split(site), call.groups(site, given)
        if not rows:
            return site.call(op, g, local, w, bias, *how, many, mask)
        how[1] = windows.left(rows)
        how[4] = [0 if d in rows else n for d, n in enumerate(how[4])]
        made: list[Any] = [None] * 3
        coarse = windows.with_spare(site, local if transposed else g, 2, rows)
        near = (
            windows.around(site, g if transposed else local, 2, rows) if mask[1] or (mask[0] and transposed) else None
        )
        if mask[0] and transposed:
            forward = [*how[:3], False, [0]]
            whole = site.call(aten.convolution.default, near, w, None, *forward, many)
            for d, size in enumerate(sizes[1]):
                if d not in rows and how[4][d] >= windows.stride[d]:  # further windows fit into what was added
                    whole = site.call(aten.slice.Tensor, whole, 2 + d, 0, size)
            made[0] = windows.without_spare(site, whole, 2, rows)
        elif mask[0]:
            made[0] = windows.spread(site, g, w, None, many, rows, sizes)
        if mask[1]:
            pair = (near, coarse) if transposed else (coarse, near)
            made[1] = get(site, site.call(op, *pair, w, None, *how, many, [False, True, False]), 1)
        if mask[2]:
            made[2] = site.call(aten.sum.dim_IntList, g, [0, *range(2, grad.dim())])
        return tuple(made)

    made = [t for t, wanted in zip([call.input, call.weight, call.bias], mask, strict=True) if wanted]
    text = line([call.output, call.input, call.weight], made)
    # the bias gradient lacks i without being a sum over it
    return parse(text, sum=f"b o {call.rows}", joined="i", linear="0", localize=localize, **call.options)
