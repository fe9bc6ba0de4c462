"""Convolutions: batch and output channels free, input channels contracted, groups split whole.

An operator without output channels is no convolution: channels are split only where each rank has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.compiler.rules.names import line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


class _Call:
    """The dims of one convolution; i and o are the channels within a group."""

    def __init__(self, weight: Any, transposed: bool, groups: int) -> None:
        kernel = [f"k{d}" for d in range(weight.dim() - 2)]
        before, after = ([f"{side}{d}" for d in range(len(kernel))] for side in "xy")
        self.bias = ["(g o)" if groups > 1 else "o"]
        channels = "(g i)" if groups > 1 else "i"
        self.input, self.output = ["b", channels, *before], ["b", *self.bias, *after]
        self.weight = [channels, "o", *kernel] if transposed else [*self.bias, "i", *kernel]
        self.whole = " ".join([*kernel, *before, *after])
        self.split_groups = groups > 1
        self.options: dict[str, Any] = {
            "whole": self.whole,
            "nonempty": "g o i" if groups > 1 else "o i",
            "sizes": {"g": groups} if groups > 1 else None,
        }

    def groups(self, site: Site, given: int) -> Any:
        return site.size("g") if self.split_groups else given


@rule(aten.convolution.default)
def _(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *, results: Any,
) -> OpRule:  # fmt: skip
    call = _Call(weight, transposed, groups)

    def localize(site: Site) -> Any:
        *args, given = site.args
        if bias is None or not site.split("i"):
            return site.call(aten.convolution.default, *args, call.groups(site, given))
        # each rank would add the bias to its summand
        args[2] = None
        y = site.all_reduce(site.call(aten.convolution.default, *args, call.groups(site, given)), "i")
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
    call = _Call(weight, transposed, groups)

    def localize(site: Site) -> Any:
        g, local, w, sizes, *rest, given, mask = site.args
        sizes = None if sizes is None else [site.operand_shape(0)[1]]
        return site.call(aten.convolution_backward.default, g, local, w, sizes, *rest, call.groups(site, given), mask)

    made = [t for t, wanted in zip([call.input, call.weight, call.bias], mask, strict=True) if wanted]
    text = line([call.output, call.input, call.weight], made)
    # the bias gradient lacks i without being a sum over it
    return parse(text, sum="b o", joined="i", linear="0", localize=localize, **call.options)
