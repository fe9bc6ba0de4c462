"""Llama 3's architecture in plain PyTorch, at the published shape of the 8B model or any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from shardc import FullyShard, Plan


@dataclass(frozen=True)
class Config:
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocab: int = 128256
    theta: float = 500_000.0


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head = c.width // c.heads
        self.wq = nn.Linear(c.width, c.heads * self.head, bias=False)
        self.wk = nn.Linear(c.width, c.kv_heads * self.head, bias=False)
        self.wv = nn.Linear(c.width, c.kv_heads * self.head, bias=False)
        self.wo = nn.Linear(c.heads * self.head, c.width, bias=False)
        self.groups = c.heads // c.kv_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (w(x).view(rows, length, -1, self.head).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k, v = (x.repeat_interleave(self.groups, 1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(rows, length, -1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class FeedForward(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(c.width, c.hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(c.width, 1e-5), nn.RMSNorm(c.width, 1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Token numbers [rows, length] in, logits of the next one out."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.tok_embeddings = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, 1e-5)
        self.output = nn.Linear(c.width, c.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        head = self.config.width // self.config.heads
        rates = self.config.theta ** -(torch.arange(0, head, 2, device=ids.device) / head)
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device), rates).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


def plan() -> Plan:
    """Fully sharded by layers along dp, tensor parallel along tp."""
    columns = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
    return Plan(
        dp=FullyShard("layers.*"),
        tp={
            **{f"layers.*.{name}": ColwiseParallel() for name in columns},
            **{f"layers.*.{name}": RowwiseParallel() for name in ("attention.wo", "feed_forward.w2")},
            "output": ColwiseParallel(),
        },
    )
