"""The pieces of tensors as they lie on the wire: flat, contiguous, as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.compiler.ir.collectives import Cut


class Pieces:
    """The pieces of one cut as they lie on the wire: flat, one after another in rank order."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.views = [cut.piece_view(i) for i in range(len(cut.sizes))]
        self.numels, self.leading = cut.numels, cut.leading
        self.longest = max(self.numels)
        filled = sum(self.numels) // self.longest if self.longest else 0
        self.gapless = set(self.numels[:filled]) <= {self.longest}  # only trailing ranks hold less

    def dealt(self, x: Tensor, width: int = 0) -> Tensor:
        """The pieces of a whole in a row; with a width, each at the start of as many elements."""
        if self.leading and (not width or set(self.numels) == {width}):
            return flattened(x)
        sizes = [width or n for n in self.numels]
        out = room(x, sum(sizes))
        parts = x.reshape(self.cut.view).split_with_sizes(list(self.cut.sizes), self.cut.dim)
        for part, space in zip(parts, out.split_with_sizes(sizes), strict=True):
            space[: part.numel()].view(part.shape).copy_(part)
        return out

    def joined(self, got: Tensor) -> Tensor:
        """The whole, flat or in its own shape, from its pieces one after another."""
        return got if self.leading else self.join(got.split_with_sizes(self.numels))

    def joined_rows(self, rows: Tensor) -> Tensor:
        """The whole, flat or in its own shape, from rows of the longest piece, less what else they hold."""
        if self.leading and self.gapless:
            return rows.view(-1)[: sum(self.numels)]
        return self.join([row[:n] for row, n in zip(rows.unbind(), self.numels, strict=True)])

    def join(self, flats: Sequence[Tensor]) -> Tensor:
        """The whole, from its flat pieces."""
        return torch.cat([p.view(v) for p, v in zip(flats, self.views, strict=True)], self.cut.dim)


def plain(x: Tensor) -> Tensor:
    """Without autograd's graph, and with conjugation and negation carried out."""
    x = x.detach() if x.requires_grad else x
    return x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x


def room(like: Tensor, numel: int) -> Tensor:
    """Memory for so many elements. All that the wire uses comes from here; what it holds must not matter."""
    return like.new_empty(numel)


def flattened(x: Tensor) -> Tensor:
    """Its elements in order, in one dim; the tensor's own memory where they lie so."""
    return x.contiguous() if x.dim() == 1 else x.contiguous().view(-1)


def as_bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)
