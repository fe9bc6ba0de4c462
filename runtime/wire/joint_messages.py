"""Collectives that move several tensors at once: one message where there would be one for each.

A rank's pieces travel one after another in one flat row; rows are padded to the longest of any rank only where the
wire needs equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardc.compiler.ir.collectives import Cut
from shardc.runtime.shards import combine
from shardc.runtime.wire.flat_pieces import Pieces, flattened, plain, room
from shardc.runtime.wire.wire import SUMMED, Collective, Issued, Line, reduce_pieces

aten = torch.ops.aten


class _Together(Collective):
    """cuts: how the mesh dim deals each whole into pieces; shapes: of what this rank gets of each."""

    def __init__(self, kind: str, cuts: Sequence[Cut], shapes: Sequence[Sequence[int]], line: Line, node: str) -> None:
        self.pieces = [Pieces(cut) for cut in cuts]
        self.rows = [sum(p.numels[i] for p in self.pieces) for i in range(line.size)]
        self.shapes = [tuple(shape) for shape in shapes]
        # every whole is its ranks' pieces one after another, all of one length
        self.even = all(p.leading and len(set(p.numels)) == 1 for p in self.pieces) and all(self.rows)
        super().__init__(kind, line, node, moves=any(self.rows))

    def start(self, x: Any) -> Issued:
        """Issue the collective for this rank's operands, all of one dtype; `wait` gives a list."""
        xs = [plain(value) for value in x]
        if self.line.size == 1:
            alone = [value.reshape(shape).contiguous() for value, shape in zip(xs, self.shapes, strict=True)]
            return Issued(None, lambda: alone, xs[0])
        if not self.moves:
            return Issued(None, lambda: [room(xs[0], 0).view(shape) for shape in self.shapes], xs[0])
        return self._start(xs)

    def _start(self, x: Any) -> Issued:
        raise NotImplementedError


class GatherTogether(_Together):
    """[n@axis] -> [n] of several values."""

    def __init__(
        self, cuts: Sequence[Cut], shapes: Sequence[Sequence[int]], line: Line, node: str = "all_gather"
    ) -> None:
        super().__init__("all_gather", cuts, shapes, line, node)

    def _start(self, x: Sequence[Tensor]) -> Issued:
        work, rows, sent = self._gather([flattened(value) for value in x], max(self.rows))
        return Issued(work, lambda: self._taken_apart(rows), sent)

    def _taken_apart(self, rows: Tensor) -> list[Tensor]:
        """Each whole in memory of its own: values are freed one by one."""
        if self.even:
            widths = [p.longest for p in self.pieces]
            parts = aten.split_with_sizes_copy.default(rows, widths, 1)
            return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        by_rank = [
            row[:n].split_with_sizes([p.numels[i] for p in self.pieces])
            for i, (row, n) in enumerate(zip(rows.unbind(), self.rows, strict=True))
        ]
        found = zip(self.pieces, zip(*by_rank, strict=True), self.shapes, strict=True)
        return [pieces.join(flats).view(shape) for pieces, flats, shape in found]


class ScatterTogether(_Together):
    """[n]+axis -> [n@axis] of several values. divisor: what all of them are divided by then."""

    def __init__(
        self,
        cuts: Sequence[Cut],
        shapes: Sequence[Sequence[int]],
        op: str,
        line: Line,
        node: str = "reduce_scatter",
        divisor: float | None = None,
    ) -> None:
        super().__init__("reduce_scatter", cuts, shapes, line, node)
        self.op, self.divisor = op, divisor

    def _start(self, x: Sequence[Tensor]) -> Issued:
        if self.op == "sum" and x[0].dtype in SUMMED and self.line.backend(x[0]) == "nccl":
            longest, mine = max(self.rows), self.rows[self.line.index]
            flat, total = self._dealt(x, [longest] * self.line.size), room(x[0], longest)
            work = self._issue(reduce_pieces, total, flat, dist.ReduceOp.SUM)
            return Issued(work, lambda: self._mine(total[:mine]), flat)
        flat = self._dealt(x, self.rows)
        work, summands = self._summands(flat, self.rows)
        return Issued(work, lambda: self._mine(combine(self.op, summands)), flat)

    def _dealt(self, xs: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        """Each rank's pieces in a row of its own, which takes so many elements."""
        if self.even:
            return torch.cat([x.reshape(len(widths), -1) for x in xs], 1).view(-1)
        flat = room(xs[0], sum(widths))
        spaces, starts = flat.split_with_sizes(list(widths)), [0] * len(widths)
        for pieces, x in zip(self.pieces, xs, strict=True):
            parts = x.reshape(pieces.cut.view).split_with_sizes(list(pieces.cut.sizes), pieces.cut.dim)
            for i, part in enumerate(parts):
                spaces[i][starts[i] :][: part.numel()].view(part.shape).copy_(part)
                starts[i] += part.numel()
        return flat

    def _mine(self, flat: Tensor) -> list[Tensor]:
        """This rank's row taken apart; each in memory of its own, for a gradient outlives the others."""
        if self.divisor is not None:
            flat.div_(self.divisor)
        parts = aten.split_with_sizes_copy.default(flat, [p.numels[self.line.index] for p in self.pieces])
        return [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
