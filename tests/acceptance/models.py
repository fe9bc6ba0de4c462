"""A small zoo: what the acceptance cases shard. Sizes are small, and odd where evenness could hide a fault."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

Attend = Literal["manual", "sdpa"]
Heads = Literal["n_head, -1", "n_head, head_dim", "-1, head_dim"]


class MLP(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 23, bias: bool = True) -> None:
        super().__init__()
        self.net1 = nn.Linear(width, hidden, bias=bias)
        self.net2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.net2(F.relu(self.net1(x)))


MLP_TP = {"net1": ColwiseParallel(), "net2": RowwiseParallel()}


class Nested(nn.Module):
    """An MLP one level down, between two Linears of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.encoder = MLP()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)))


class Deep(nn.Module):
    """Several MLPs, one after the other."""

    def __init__(self, depth: int = 2, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Attention(nn.Module):
    """Causal self-attention with one projection each for queries, keys and values, or one for all of them."""

    def __init__(
        self,
        dim: int = 16,
        heads: int = 4,
        fused: bool = False,
        attend: Attend = "manual",
        view: Heads = "n_head, head_dim",
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.attend, self.view = dim, heads, attend, view
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (self._heads_of(t) for t in self._projected(x))
        if self.attend == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            later = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
            out = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, time, self.dim))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if hasattr(self, "qkv"):
            return self.qkv(x).chunk(3, -1)
        return self.q(x), self.k(x), self.v(x)

    def _heads_of(self, x: Tensor) -> Tensor:
        sizes = {
            "n_head, -1": (self.heads, -1),
            "n_head, head_dim": (self.heads, self.dim // self.heads),
            "-1, head_dim": (-1, self.dim // self.heads),
        }
        return x.view(*x.shape[:2], *sizes[self.view]).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 4, **attention: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, **attention)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder with learned positions; its head may be the embedding's own weight."""

    def __init__(
        self,
        vocab: int = 16,
        dim: int = 16,
        heads: int = 4,
        layers: int = 2,
        length: int = 8,
        tied: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(Block(dim, heads, **attention) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def transformer_tp(fused: bool = False) -> dict[str, Any]:
    """The usual plan: projections in and the first of each MLP by columns, the others by rows."""
    inward = ["attn.qkv"] if fused else ["attn.q", "attn.k", "attn.v"]
    return {
        **{f"layers.*.{name}": ColwiseParallel() for name in [*inward, "up"]},
        **{f"layers.*.{name}": RowwiseParallel() for name in ["attn.proj", "down"]},
    }


TRANSFORMER_TP = {
    **transformer_tp(),
    "tokens": RowwiseParallel(),
    "positions": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
# Norms work on slices of the sequence; what tensor parallelism sums is scattered over it.
TRANSFORMER_SP = {
    **TRANSFORMER_TP,
    "tokens": RowwiseParallel(output_layouts=Shard(1)),
    "positions": RowwiseParallel(output_layouts=Shard(0)),
    "layers.*.norm[12]": SequenceParallel(),
    "layers.*.attn.proj": RowwiseParallel(output_layouts=Shard(1)),
    "layers.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class RMSNorm(nn.Module):
    """Written out, as Llama models do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def rotary(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines, each (length, head_dim)."""
    rates = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), rates)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x), cos, sin)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.wq(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, time, -1))


class Llama(nn.Module):
    """RMSNorm, rotary positions, gated SiLU and grouped heads."""

    def __init__(
        self, vocab: int = 13, dim: int = 16, heads: int = 4, kv_heads: int = 2, layers: int = 1, hidden: int = 22
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        cos, sin = rotary(32, dim // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        time = ids.shape[1]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:time], self.sin[:time])
        return self.head(self.norm(x))


LLAMA_TP = {
    **{f"layers.*.{name}": ColwiseParallel() for name in ("wq", "wk", "wv", "gate", "up")},
    **{f"layers.*.{name}": RowwiseParallel() for name in ("wo", "down")},
}


LLAMA_SP = {
    **LLAMA_TP,
    "embed": RowwiseParallel(output_layouts=Shard(1)),
    "layers.*.norm[12]": SequenceParallel(),
    "layers.*.wo": RowwiseParallel(output_layouts=Shard(1)),
    "layers.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm, a pool and a Linear."""

    def __init__(self, channels: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))
