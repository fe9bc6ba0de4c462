"""Convolutions: batch and output channels free, input channels contracted, groups split whole.

A spatial dim may be split over one mesh dim: each rank fetches the rows around its own that its results need, zeros
for those in the padding. Backward so where the stride is one; transposed convolutions keep space whole. An operator
without output channels is no convolution: channels, and rows, are split only where each rank has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.compiler.rules.joint import get
from shardc.compiler.rules.names import line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


class _Call:
    """The dims of one convolution; i and o are the channels within a group. free: spatial dims that may be split."""

    def __init__(self, weight: Any, transposed: bool, groups: int, free: Sequence[int]) -> None:
        kernel = [f"k{d}" for d in range(weight.dim() - 2)]
        before, after = ([f"{side}{d}" for d in range(len(kernel))] for side in "xy")
        self.bias = ["(g o)" if groups > 1 else "o"]
        channels = "(g i)" if groups > 1 else "i"
        self.input, self.output = ["b", channels, *before], ["b", *self.bias, *after]
        self.weight = [channels, "o", *kernel] if transposed else [*self.bias, "i", *kernel]
        self.split_groups, self.free = groups > 1, free
        rows = [name for d in free for name in (f"x{d}", f"y{d}")]
        self.rows = " ".join(rows)
        self.options: dict[str, Any] = {
            "whole": " ".join(name for name in (*kernel, *before, *after) if name not in rows),
            "nonempty": ("g o i " if groups > 1 else "o i ") + self.rows,
            "plain": self.rows,
            "lone": self.rows,
            "follows": {f"y{d}": f"x{d}" for d in free},
            "sizes": {"g": groups} if groups > 1 else None,
        }

    def split_rows(self, site: Site) -> list[int]:
        return [d for d in self.free if site.split(f"x{d}")]

    def groups(self, site: Site, given: int) -> Any:
        return site.size("g") if self.split_groups else given


class _Space:
    """Which rows of an image a row of the result is made of, dim by dim."""

    def __init__(self, weight: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
        count = weight.dim() - 2
        self.stride, self.padding, dilation = (list(t) * (count // len(t)) for t in (stride, padding, dilation))
        self.reach = [(weight.shape[2 + d] - 1) * dilation[d] for d in range(count)]  # of a kernel, less one

    def left(self, rows: Sequence[int]) -> list[int]:
        """The padding that is left to the operator: that of split dims has been fetched."""
        return [0 if d in rows else n for d, n in enumerate(self.padding)]

    def around(self, site: Site, x: Any, rows: Sequence[int]) -> Any:
        """The rows of x that a rank's rows of the result are made of."""
        for d in rows:
            st, pad, reach = self.stride[d], self.padding[d], self.reach[d]
            x = site.fetch(
                x, 2 + d, f"x{d}", lambda i, n, st=st, pad=pad, reach=reach: [
                    range(i * st - pad, (i + n - 1) * st - pad + reach + 1)
                ], f"y{d}", 0.0,
            )  # fmt: skip
        return x

    def reaching(self, site: Site, g: Any, x: Any, rows: Sequence[int]) -> tuple[Any, Any]:
        """The rows of the gradient that a rank's rows of x reach, at stride one, and x as wide as those reach back."""
        for d in rows:
            pad, reach = self.padding[d], self.reach[d]
            g = site.fetch(
                g,
                2 + d,
                f"y{d}",
                lambda i, n, pad=pad, reach=reach: [range(i + pad - reach, i + n + pad)],
                f"x{d}",
                0.0,
            )
            ends = [0, 0] * (len(self.reach) - 1 - d) + [reach, reach]
            x = site.call(aten.constant_pad_nd.default, x, ends)
        return g, x

    def inner(self, site: Site, x: Any, rows: Sequence[int]) -> Any:
        """Without what `reaching` put around it."""
        for d in rows:
            if self.reach[d]:
                x = site.call(aten.slice.Tensor, x, 2 + d, self.reach[d], -self.reach[d])
        return x


@rule(aten.convolution.default)
def _(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *, results: Any,
) -> OpRule:  # fmt: skip
    call = _Call(weight, transposed, groups, () if transposed else range(weight.dim() - 2))
    space = _Space(weight, stride, padding, dilation)

    def localize(site: Site) -> Any:
        *args, given = site.args
        rows = call.split_rows(site)
        args[0], args[4] = space.around(site, args[0], rows), space.left(rows)
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
    free = () if transposed else [d for d in range(weight.dim() - 2) if stride[d % len(stride)] == 1]
    call, op = _Call(weight, transposed, groups, free), aten.convolution_backward.default
    space = _Space(weight, stride, padding, dilation)

    def localize(site: Site) -> Any:
        g, local, w, sizes, st, pad, *rest, given, mask = site.args
        sizes = None if sizes is None else [site.operand_shape(0)[1]]
        rest = (*rest, call.groups(site, given))
        rows = call.split_rows(site)
        if not rows:
            return site.call(op, g, local, w, sizes, st, pad, *rest, mask)
        left = space.left(rows)
        made: list[Any] = [None] * 3
        if any(mask[1:]):  # weights meet all that the rank's results were made of
            near = space.around(site, local, rows)
            both = site.call(op, g, near, w, sizes, st, left, *rest, [False, *mask[1:]])
            made[1:] = (get(site, both, i) if mask[i] else None for i in (1, 2))
        if mask[0]:
            g, wider = space.reaching(site, g, local, rows)
            alone = site.call(op, g, wider, w, None, st, left, *rest, [True, False, False])
            made[0] = space.inner(site, get(site, alone, 0), rows)
        return tuple(made)

    made = [t for t, wanted in zip([call.input, call.weight, call.bias], mask, strict=True) if wanted]
    text = line([call.output, call.input, call.weight], made)
    # the bias gradient lacks i without being a sum over it
    return parse(text, sum=f"b o {call.rows}", joined="i", linear="0", localize=localize, **call.options)
