"""Images whose rows ranks share out, and operators that look at them through windows: convolution and pooling.

Row j of the coarse side belongs to the rows j * stride - padding + k * dilation of the fine one, k over the kernel.
A rank that makes coarse rows fetches the fine rows in their windows; one that makes fine rows fetches the coarse rows
whose windows hold them. Either way the rows may come from any rank, so nothing is too far: a kernel may reach beyond
a neighbour, a piece may be empty. What lies outside of the image is filled in, so that the operator pads no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.compiler.rules.site import Site

aten = torch.ops.aten


class Windows:
    """The windows of one call, spatial dim by spatial dim. fine, coarse: how the factors of each side begin."""

    def __init__(
        self, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any = 1, fine: str = "x", coarse: str = "y"
    ) -> None:
        count = len(kernel)
        self.kernel, self.fine, self.coarse = list(kernel), fine, coarse
        self.stride, self.padding, self.dilation = (_each(t, count) for t in (stride, padding, dilation))
        self.reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True)]  # of a kernel, less one

    def names(self, side: str) -> list[str]:
        return [f"{side}{d}" for d in range(len(self.kernel))]

    def options(self) -> dict[str, Any]:
        """What a rule says of both sides' factors: they are split together."""
        rows = " ".join(f"x{d} y{d}" for d in range(len(self.kernel)))
        return {"plain": rows, "lone": rows, "follows": {f"y{d}": f"x{d}" for d in range(len(self.kernel))}}

    def split(self, site: Site) -> list[int]:
        """The spatial dims that are split here."""
        return [d for d, name in enumerate(self.names("x")) if site.split(name)]

    def left(self, rows: Sequence[int]) -> list[int]:
        """The padding that is left to the operator: that of split dims has been fetched."""
        return [0 if d in rows else n for d, n in enumerate(self.padding)]

    def spare(self, site: Site, d: int) -> int:
        """One more window on every rank where some rank has none: operators want some."""
        return int(site.may_be_empty(f"{self.coarse}{d}"))

    def around(self, site: Site, x: Any, lead: int, rows: Sequence[int], fill: float = 0.0) -> Any:
        """The fine rows in the windows of a rank's coarse rows, and in a spare one. lead: dims before the spatial."""
        for d in rows:
            st, pad, reach, more = self.stride[d], self.padding[d], self.reach[d], self.spare(site, d)
            x = site.fetch(
                x, lead + d, f"{self.fine}{d}", lambda i, n, st=st, pad=pad, reach=reach, more=more: [
                    range(i * st - pad, (i + n + more - 1) * st - pad + reach + 1)
                ], f"{self.coarse}{d}", fill,
            )  # fmt: skip
        return x

    def extent(self, site: Site, d: int) -> Any:
        """How many rows `around` gives along a split dim."""
        return (site.size(f"{self.coarse}{d}") + (self.spare(site, d) - 1)) * self.stride[d] + (self.reach[d] + 1)

    def with_spare(self, site: Site, y: Any, lead: int, rows: Sequence[int]) -> Any:
        """Coarse rows, and zeros for the spare window."""
        ends = [n for d in reversed(range(len(self.kernel))) for n in (0, self.spare(site, d) if d in rows else 0)]
        return site.call(aten.constant_pad_nd.default, y, ends) if any(ends) else y

    def without_spare(self, site: Site, y: Any, lead: int, rows: Sequence[int]) -> Any:
        for d in rows:
            if self.spare(site, d):
                y = site.call(aten.slice.Tensor, y, lead + d, 0, site.size(f"{self.coarse}{d}"))
        return y

    def reaching(
        self, site: Site, y: Any, lead: int, rows: Sequence[int], fill: float = 0.0, begun: bool = False
    ) -> Any:
        """The coarse rows whose windows hold some of a rank's fine rows, at least one. begun: where the first of
        these windows begins is the same for every rank, or told by `_own`."""
        for d in rows:
            st, pad, reach = self.stride[d], self.padding[d], self.reach[d]
            early = begun and not self._in_step(site, d)

            def wanted(i: int, n: int, st: int = st, pad: int = pad, reach: int = reach, early: bool = early) -> Any:
                low, high = i + pad - reach, i + n - 1 + pad
                first = low // st if early else -(-low // st)
                last = max(high // st, -((reach - high) // st)) if begun else high // st
                return [range(first, max(first, last) + 1)]

            y = site.fetch(y, lead + d, f"{self.coarse}{d}", wanted, f"{self.fine}{d}", fill)
        return y

    def _in_step(self, site: Site, d: int) -> bool:
        """Whether pieces of fine rows all begin at one place of a stride, which the first window then reaches."""
        name, st = f"{self.fine}{d}", self.stride[d]
        piece = -(-site.full(name) // site.ways(name))
        return piece % st == 0 and self.reach[d] >= (self.reach[d] - self.padding[d]) % st

    def spread(
        self,
        site: Site,
        y: Any,
        weight: Any,
        bias: Any,
        groups: Any,
        rows: Sequence[int],
        sizes: Sequence[Sequence[int]],
    ) -> Any:
        """A rank's fine rows, from coarse ones by a transposed convolution. sizes: global ones, coarse and fine."""
        y = self.reaching(site, y, 2, rows, begun=True)
        made = [(n - 1) * self.stride[d] + self.reach[d] + 1 - 2 * self.padding[d] for d, n in enumerate(sizes[0])]
        missing = [0 if d in rows else n - made[d] for d, n in enumerate(sizes[1])]
        how = (self.stride, self.left(rows), self.dilation, True, [max(n, 0) for n in missing])
        x = site.call(aten.convolution.default, y, weight, bias, *how, groups)
        for d, size in enumerate(sizes[1]):
            if d in rows:
                x = self._own(site, x, 2, d)
            elif missing[d] < 0:  # windows that go beyond the image
                x = site.call(aten.slice.Tensor, x, 2 + d, 0, size)
        return x

    def _own(self, site: Site, x: Any, lead: int, d: int) -> Any:
        """A rank's own of the fine rows in the windows that `reaching` gave."""
        reach, pad, st, name = self.reach[d], self.padding[d], self.stride[d], f"{self.fine}{d}"
        before = reach - (reach - pad) % st
        if not self._in_step(site, d):
            x = site.call(aten.slice.Tensor, x, lead + d, (site.start(name) + (pad - reach)) % st, 2**63 - 1)
            before = reach
        return site.call(aten.slice.Tensor, x, lead + d, before, site.size(name) + before)


def _each(given: Any, count: int) -> list[int]:
    """One number for each spatial dim."""
    given = [given] if isinstance(given, int) else list(given)
    return given * (count // len(given))
