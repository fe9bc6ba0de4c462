"""Pooling over windows: batch and channels free, spatial dims split as those of a convolution are (`windows.py`).

Rows outside of the image are the lowest value to a maximum and zero to an average, whose count of elements says what
they weigh. The indices of a maximum are global. Adaptive pooling is the same where its windows are all alike; where
they are not, or a dim comes down to one row, its spatial dims stay whole; so do those of averages of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, line
from shardc.compiler.rules.ops.images.resample import PACKED, spatial
from shardc.compiler.rules.ops.images.windows import Windows
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import cast, get, lowest, packed, wide
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


class _Pool:
    """One call over windows: its lines, and how its local form is made."""

    def __init__(self, fine: Any, coarse: Any, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> None:
        self.rank = 2 if len(kernel) == 2 else 3
        self.windows = Windows(kernel, list(stride) or kernel, padding, dilation)
        self.lead = fine.dim() - len(kernel)
        names = dims(self.lead)
        self.fine, self.coarse = ([*names, *self.windows.names(side)] for side in "xy")
        self.sizes = [list(t.shape[self.lead :]) for t in (coarse, fine)]
        self.options = {**self.windows.options(), "nonempty": names[-1]}

    def forward(self, results: int, localize: Any, linear: str) -> OpRule:
        text = line([self.fine], [self.coarse] * results)
        return parse(text, linear=linear, localize=localize, **self.options)

    def backward(self, operands: str, localize: Any) -> OpRule:
        """operands: f for each that is as the fine side, c as the coarse one."""
        tensors = [self.fine if side == "f" else self.coarse for side in operands]
        return parse(line(tensors, [self.fine]), linear="0", localize=localize, **self.options)

    def shape(self, d: int, values: Sequence[int]) -> list[int]:
        return [*values, *[1] * (len(self.windows.kernel) - 1 - d)]


def _windowed(site: Site, op: Any, pool: _Pool, step: Callable[[list[int]], Any]) -> Any:
    rows = pool.windows.split(site)
    if rows:
        return step(rows)
    return site.call(op, *(packed(site, range(3)) if op in PACKED else site.args), **site.kwargs)


# -- averages ----------------------------------------------------------------------------------------


def _average(pool: _Pool, include: bool, divisor: int | None, device: Any) -> tuple[Any, Any]:
    """(forward, backward) on one rank: sums of windows over the kernel's volume, and what that is off by."""
    windows = pool.windows
    over = divisor or math.prod(windows.kernel)

    def weighed(site: Site, y: Any, dtype: torch.dtype) -> Any:
        """A rank's coarse rows times the kernel's volume over how many elements each window has."""
        for d, (k, st, pad) in enumerate(zip(windows.kernel, windows.stride, windows.padding, strict=True)):
            low, high = (-pad, pool.sizes[1][d] + pad) if include else (0, pool.sizes[1][d])
            begins = [j * st - pad for j in range(pool.sizes[0][d])]
            if divisor or all(low <= i and i + k <= high for i in begins):
                continue
            count = site.size(f"y{d}") if site.split(f"y{d}") else pool.sizes[0][d]
            first = site.call(aten.mul.Scalar, site.call(aten.arange.default, count, device=device), st)
            first = site.call(aten.add.Scalar, first, site.start(f"y{d}") * st - pad)
            end = site.call(aten.clamp.default, site.call(aten.add.Scalar, first, k), None, high)
            held = site.call(aten.sub.Tensor, end, site.call(aten.clamp.default, first, low))
            held = site.call(aten._to_copy.default, held, dtype=wide(dtype))
            share = site.call(aten.mul.Scalar, site.call(aten.reciprocal.default, held), k)
            share = cast(site, share, wide(dtype), dtype)
            y = site.call(aten.mul.Tensor, y, site.call(aten.view.default, share, pool.shape(d, [-1])))
        return y

    return over, weighed


def _averaging(rank: int) -> None:
    forward, backward = (getattr(aten, f"avg_pool{rank}d{end}").default for end in ("", "_backward"))

    def build(
        x: Any, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, include: bool = True,
        divisor: int | None = None, *, results: Any, count_include_pad: bool | None = None,
        divisor_override: int | None = None,
    ) -> OpRule:  # fmt: skip
        if not x.is_floating_point():  # rounded down: no sum of averages, and no average of other weight
            return spatial(forward, rank)(x, results=results)
        include, divisor = count_include_pad if count_include_pad is not None else include, divisor or divisor_override
        pool = _Pool(x, results[0], _of(rank, kernel), stride, padding)
        return pool.forward(1, _averages(forward, pool, ceil_mode, include, divisor, x), "0")

    def build_backward(
        grad: Any, x: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include: bool,
        divisor: int | None, *, results: Any,
    ) -> OpRule:  # fmt: skip
        pool = _Pool(x, grad, _of(rank, kernel), stride, padding)
        return pool.backward("cf", _averages_backward(backward, pool, include, divisor, x))

    rule(forward)(build)
    rule(backward)(build_backward)


def _averages(op: Any, pool: _Pool, ceil_mode: bool, include: bool, divisor: int | None, x: Any) -> Any:
    windows, pooled = pool.windows, getattr(aten, f"avg_pool{pool.rank}d").default
    over, weighed = _average(pool, include, divisor, x.device)

    def step(site: Site, rows: list[int]) -> Any:
        near = windows.around(site, site.args[0], pool.lead, rows)
        y = site.call(pooled, near, windows.kernel, windows.stride, windows.left(rows), ceil_mode, True, over)
        return weighed(site, windows.without_spare(site, y, pool.lead, rows), x.dtype)

    return lambda site: _windowed(site, op, pool, lambda rows: step(site, rows))


def _averages_backward(op: Any, pool: _Pool, include: bool, divisor: int | None, x: Any) -> Any:
    """A transposed convolution of one channel, that the others are laid under as a batch."""
    over, weighed = _average(pool, include, divisor, x.device)

    def step(site: Site, rows: list[int]) -> Any:
        y = weighed(site, site.args[0], x.dtype)
        y = site.call(aten.unsqueeze.default, y if pool.lead == 1 else site.call(aten.flatten.using_ints, y, 0, 1), 1)
        ones = site.call(
            aten.full.default, [1, 1, *pool.windows.kernel], 1 / over, dtype=x.dtype, device=x.device
        )  # fmt: skip
        out = pool.windows.spread(site, y, ones, None, 1, rows, pool.sizes)
        return site.call(aten.reshape.default, out, site.result_shape())

    return lambda site: _windowed(site, op, pool, lambda rows: step(site, rows))


def _of(rank: int, kernel: Sequence[int]) -> list[int]:
    return list(kernel) * (rank // len(kernel))


# -- maxima, with the index of each in its image -------------------------------------------------------


def _maxima(op: Any, pool: _Pool, ceil_mode: bool, x: Any) -> Any:
    windows, pooled = pool.windows, getattr(aten, f"max_pool{pool.rank}d_with_indices").default

    def step(site: Site, rows: list[int]) -> Any:
        near = windows.around(site, site.args[0], pool.lead, rows, lowest(x.dtype))
        how = (windows.kernel, windows.stride, windows.left(rows), windows.dilation, ceil_mode)
        pair = site.call(pooled, near, *how)
        value, at = (windows.without_spare(site, get(site, pair, i), pool.lead, rows) for i in (0, 1))
        return value, _global(site, pool, at, rows)

    return lambda site: _windowed(site, op, pool, lambda rows: step(site, rows))


def _global(site: Site, pool: _Pool, at: Any, rows: Sequence[int]) -> Any:
    """Places in what a rank has fetched as places in the image. Of a window that is all lowest the first place is
    outside of the image, where there is padding: then it is the first inside."""
    windows, places = pool.windows, []
    for d, size in reversed(list(enumerate(pool.sizes[1]))):
        here, at = _last(site, at, windows.extent(site, d) if d in rows else size) if d else (at, None)
        if d in rows:
            pad, dilation = windows.padding[d], windows.dilation[d]
            here = site.call(aten.add.Scalar, here, site.start(f"y{d}") * windows.stride[d] - pad)
            if pad:
                inside = site.call(aten.remainder.Scalar, here, dilation)
                here = site.call(aten.where.self, site.call(aten.lt.Scalar, here, 0), inside, here)
        places.append(here)
    return _flat(site, places[::-1], pool.sizes[1])


def _last(site: Site, at: Any, size: Any) -> tuple[Any, Any]:
    """Of places in a row-major image, the last coordinate and the place in the dims before."""
    before = site.call(aten.div.Scalar_mode, at, size, rounding_mode="floor")
    return site.call(aten.remainder.Scalar, at, size), before


def _flat(site: Site, places: Sequence[Any], sizes: Sequence[Any]) -> Any:
    at = places[0]
    for here, size in zip(places[1:], sizes[1:], strict=True):
        at = site.call(aten.add.Tensor, site.call(aten.mul.Scalar, at, size), here)
    return at


def _maxima_backward(op: Any, pool: _Pool, indices: int) -> Any:
    """Each rank adds up what reaches its own rows; one row in front of them takes what belongs to others. indices:
    which argument they are."""
    windows, sizes = pool.windows, pool.sizes[1]

    def step(site: Site, rows: list[int]) -> Any:
        y = windows.reaching(site, site.args[0], pool.lead, rows)
        at, places = windows.reaching(site, site.args[indices], pool.lead, rows, -1), []
        shape = site.result_shape()
        inside = site.call(aten.ge.Scalar, at, 0)
        for d, size in reversed(list(enumerate(sizes))):
            here, at = _last(site, at, size) if d else (at, None)
            if d in rows:
                here = site.call(aten.sub.Scalar, here, site.start(f"x{d}") - 1)
                low, high = site.call(aten.gt.Scalar, here, 0), site.call(aten.le.Scalar, here, shape[pool.lead + d])
                inside = site.call(aten.logical_and.default, inside, site.call(aten.logical_and.default, low, high))
                shape[pool.lead + d] += 1
            places.append(here)
        at = site.call(aten.mul.Tensor, _flat(site, places[::-1], shape[pool.lead :]), inside)
        at, y = (site.call(aten.flatten.using_ints, t, pool.lead, -1) for t in (at, y))
        plane = site.call(aten.flatten.using_ints, site.call(aten.new_zeros.default, y, shape), pool.lead, -1)
        out = site.call(aten.scatter_add.default, plane, -1, at, y)
        out = site.call(aten.view.default, out, shape)
        for d in rows:
            out = site.call(aten.slice.Tensor, out, pool.lead + d, 1, 2**63 - 1)
        return out

    return lambda site: _windowed(site, op, pool, lambda rows: step(site, rows))


def _maximizing(rank: int) -> None:
    forward, backward = (getattr(aten, f"max_pool{rank}d_with_indices{end}").default for end in ("", "_backward"))

    def build(
        x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
        *, results: Any,
    ) -> OpRule:  # fmt: skip
        pool = _Pool(x, results[0], _of(rank, kernel), stride, padding, dilation)
        return pool.forward(2, _maxima(forward, pool, ceil_mode, x), "")

    def build_backward(
        grad: Any, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, at: Any,
        *, results: Any,
    ) -> OpRule:  # fmt: skip
        pool = _Pool(x, grad, _of(rank, kernel), stride, padding, dilation)
        return pool.backward("cfc", _maxima_backward(backward, pool, 7))

    rule(forward)(build)
    rule(backward)(build_backward)


# -- windows as many as are wanted ---------------------------------------------------------------------


def _alike(rank: int, fine: Any, coarse: Any) -> _Pool | None:
    """The pool of an adaptive call whose windows are all of one size; None where they are not."""
    pairs = [(fine.shape[-d], coarse.shape[-d]) for d in range(rank, 0, -1)]
    if any(m < 2 or n == 0 or n % m for n, m in pairs):
        return None
    return _Pool(fine, coarse, [n // m for n, m in pairs], (), 0)


def _adaptive(rank: int) -> None:
    mean, mean_back = (getattr(aten, f"_adaptive_avg_pool{rank}d{end}").default for end in ("", "_backward"))
    most, most_back = (getattr(aten, f"adaptive_max_pool{rank}d{end}").default for end in ("", "_backward"))

    def registered(op: Any, linear: str, fine: int, build: Callable[[_Pool, Any], OpRule]) -> None:
        other = spatial(op, rank, linear)

        def either(*args: Any, results: Any) -> OpRule:
            image = args[fine]
            pool = _alike(rank, image, results[0] if fine == 0 else args[0])
            return build(pool, image) if pool else other(*args, results=results)

        rule(op)(either)

    registered(mean, "0", 0, lambda pool, x: pool.forward(1, _averages(mean, pool, False, True, None, x), "0"))
    registered(
        mean_back, "0", 1, lambda pool, x: pool.backward("cf", _averages_backward(mean_back, pool, True, None, x))
    )
    registered(most, "", 0, lambda pool, x: pool.forward(2, _maxima(most, pool, False, x), ""))
    registered(most_back, "0", 1, lambda pool, x: pool.backward("cfc", _maxima_backward(most_back, pool, 2)))


for _rank in (2, 3):
    _averaging(_rank)
    _maximizing(_rank)
    _adaptive(_rank)
