"""Text that every machine has: the source files of Python's own standard library, as bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, as integer tensors; the held-out ones come from other files."""

    train: Tensor
    held_out: Tensor
    files: int

    def batch(self, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """(ids, next ids) of shape [rows, length]: the same for a step wherever and however often it is drawn."""
        return _windows(self.train, torch.Generator().manual_seed(step), rows, length)

    def held_out_batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """A fixed batch of held-out text."""
        return _windows(self.held_out, torch.Generator().manual_seed(0), rows, length)


def standard_library(megabytes: float = 4.0) -> Text:
    """The top-level modules of the standard library in the order of their names; every tenth is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    kept: list[list[bytes]] = [[], []]
    total = 0
    for i, path in enumerate(paths):
        data = path.read_bytes()
        total += len(data)
        kept[i % 10 == 9].append(data)
        if total > megabytes * 2**20:
            break
    return Text(_tensor(kept[0]), _tensor(kept[1]), len(kept[0]) + len(kept[1]))


def _tensor(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8).long()


def _windows(text: Tensor, draw: torch.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - length - 1, (rows,), generator=draw).tolist()
    windows = torch.stack([text[s : s + length + 1] for s in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
