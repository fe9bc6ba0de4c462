"""The norm of gradients of which ranks hold pieces, and clipping to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardc.runtime.wire.line import Line
from shardc.runtime.wire.wire import AllReduce


class Piece(NamedTuple):
    """What this rank holds of a gradient, and the mesh dims along which others hold other parts of it."""

    gradient: Tensor | None
    axes: tuple[str, ...]


def total_norm(pieces: Sequence[Piece], p: float, lines: Mapping[str, Line], device: torch.device) -> Tensor:
    """The p-norm of all gradients as one vector, replicas counted once; the same bits on every rank.

    At most one all-reduce per mesh dim, whichever gradients are there: all ranks must call it alike.
    """
    groups: dict[tuple[str, ...], list[Tensor]] = {axes: [] for _, axes in pieces}
    for gradient, axes in pieces:
        if gradient is not None and gradient.numel():
            groups[axes].append(torch.linalg.vector_norm(gradient.detach(), p, dtype=_wide(gradient)).double())
    parts = {axes: _combined(norms, p).to(device) for axes, norms in groups.items()}
    for axis, line in lines.items():
        mine = [axes for axes in parts if axis in axes]
        if mine and line.size > 1:
            reduce = AllReduce("max" if p == math.inf else "sum", line, "clip_grad_norm_")
            reduced = reduce(torch.stack([parts[axes] for axes in mine]))
            parts |= dict(zip(mine, reduced.unbind(), strict=True))
    if not parts:
        return torch.zeros((), device=device)
    whole = torch.stack(list(parts.values()))
    return whole.max() if p == math.inf else whole.sum() ** (1 / p)


def scale(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm is at most `max_norm`, as torch's own clipping does."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.detach().mul_(factor.to(gradient.device, _wide(gradient)))


def _wide(x: Tensor) -> torch.dtype:
    """Norms of short floats are taken in single precision; those of complex numbers are real."""
    return torch.promote_types(x.dtype.to_real(), torch.float32)


def _combined(norms: Sequence[Tensor], p: float) -> Tensor:
    """What ranks add up (or of which they take the largest) for a norm of norms."""
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    all_of = torch.stack(list(norms))
    return all_of.max() if p == math.inf else (all_of**p).sum()
