"""The model that the benchmarks share: a GPT as anyone would write it, and how each way of running splits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel


@dataclass(frozen=True)
class Shape:
    """batch: rows in all; a data-parallel rank has its part of them."""

    width: int
    heads: int
    layers: int = 4
    vocab: int = 256
    length: int = 32
    batch: int = 4


SHAPES = {
    "small": Shape(width=64, heads=4),  # an activation is 32 KB: the host decides
    "large": Shape(width=512, heads=8, length=64),  # an activation is 512 KB: the kernels decide
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.head = d // shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (p(x).view(rows, length, -1, self.head).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(rows, length, -1))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(shape)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token numbers in, logits of the next one out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.place = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch_of(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(token numbers, the next ones) of the whole batch."""
    drawn = torch.randint(shape.vocab, (shape.batch, shape.length + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def tensor_parallel() -> dict:
    """The usual plan: attention by heads, the MLP by features; two all-reduces forward and two backward per block."""
    columns = ("attention.q", "attention.k", "attention.v", "up")
    return {
        **{f"blocks.*.{name}": ColwiseParallel() for name in columns},
        **{f"blocks.*.{name}": RowwiseParallel() for name in ("attention.o", "down")},
    }
