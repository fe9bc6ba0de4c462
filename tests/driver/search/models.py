"""Models that searches are tried on, each with the inputs of a call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention and a feed-forward, before each a norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.after = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (w(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Decoder(nn.Module):
    """Token numbers [rows, length] in, the mean loss of the next ones out."""

    def __init__(self, width: int = 16, layers: int = 5, vocab: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.last(x)).flatten(0, 1), ids[:, 1:].flatten())


def layers(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(count))


class Stacks(nn.Module):
    """Two stacks of layers, one behind the other."""

    def __init__(self, first: int = 6, second: int = 7) -> None:
        super().__init__()
        self.one, self.two = layers(first), layers(second)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.one, *self.two):
            x = layer(x)
        return x


class Between(nn.Module):
    """Something is computed between the layers, by none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Twice(nn.Module):
    """A layer in the middle whose result is used behind the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(6)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found[-1] + found[3]


class Tied(nn.Module):
    """Layers that share a parameter, whose gradients are summed layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(6)
        for layer in self.layers:
            layer[0].weight = self.layers[0][0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Differ(nn.Module):
    """Layers of the same parameters that do not do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(6)
        self.layers[3][1] = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mlp(width: int = 16, hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def ids(rows: int, length: int = 9, vocab: int = 32) -> Tensor:
    return torch.randint(vocab, (rows, length))
