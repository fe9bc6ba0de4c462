"""The pieces of tensors as they lie on the wire: flat, contiguous, as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.compiler.ir.collectives import Cut
from shardc.compiler.ir.routes import joint_rows

aten = torch.ops.aten


class Pieces:
    """How values that move together lie on the wire: a row for each rank, in which its pieces of them follow one
    another."""

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self.cuts, self.one = cuts, len(cuts) == 1
        self.each = [cut.numels for cut in cuts]
        self.numels = joint_rows(cuts)
        self.longest = max(self.numels)
        self.leading, self.gapless = all(cut.leading for cut in cuts), all(cut.gapless for cut in cuts)
        # every whole is its ranks' pieces one after another, all of one length
        self.even = self.leading and all(self.numels) and all(len(set(numels)) == 1 for numels in self.each)

    def dealt(self, xs: Sequence[Tensor], width: int = 0) -> Tensor:
        """The rows of these wholes one after another; with a width, each at the start of as many elements."""
        if self.one and self.leading and (not width or {*self.numels} == {width}):
            return flattened(xs[0])
        if self.even:
            return torch.cat([x.reshape(len(self.numels), -1) for x in xs], 1).view(-1)
        flat = room(xs[0], sum(sizes := [width or n for n in self.numels]))
        rows, filled = flat.split_with_sizes(sizes), [0] * len(sizes)
        for cut, x in zip(self.cuts, xs, strict=True):
            for i, part in enumerate(x.reshape(cut.view).split_with_sizes(list(cut.sizes), cut.dim)):
                rows[i][filled[i] :][: part.numel()].view(part.shape).copy_(part)
                filled[i] += part.numel()
        return flat

    def joined(self, flat: Tensor, width: int = 0) -> list[Tensor]:
        """The wholes, flat or in a shape of their own, from such rows. Several lie in memory of their own each: they
        are freed one by one."""
        if self.one and self.leading and (not width or self.gapless):
            return [flat[: sum(self.numels)]]
        if self.even:
            widths = [numels[0] for numels in self.each]
            return list(aten.split_with_sizes_copy.default(flat.view(len(self.numels), -1), widths, 1))
        rows = zip(flat.split_with_sizes([width or n for n in self.numels]), self.numels, strict=True)
        by_rank = [[numels[i] for numels in self.each] for i in range(len(self.numels))]
        dealt = [row[:n].split_with_sizes(sizes) for (row, n), sizes in zip(rows, by_rank, strict=True)]
        return [
            torch.cat([flat.view(cut.piece_view(i)) for i, flat in enumerate(flats)], cut.dim)
            for cut, flats in zip(self.cuts, zip(*dealt, strict=True), strict=True)
        ]

    def taken(self, row: Tensor, index: int) -> list[Tensor]:
        """One rank's pieces from its row, several in memory of their own each."""
        if self.one:
            return [row]
        return list(aten.split_with_sizes_copy.default(row, [numels[index] for numels in self.each]))


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
