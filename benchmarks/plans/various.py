"""Small models of many kinds in plain PyTorch, each with the inputs of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.gpt import GPT, Shape  # noqa: E402
from models.llama import Config, Llama  # noqa: E402

ROWS, LENGTH, WIDTH, WORDS = 8, 16, 32, 64


class Reader(nn.Module):
    """A decoder with its loss: token numbers [rows, length] in, a scalar out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class Images(nn.Module):
    """Convolutions with batch norms, a head behind their mean."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down(x))
        b = torch.relu(self.deep(F.max_pool2d(a, 2)))
        return self.out(torch.cat([a, self.up(b)], 1))


class Vision(nn.Module):
    """Patches, an encoder, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Towers(nn.Module):
    """Two encoders that are trained to agree, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        scores = F.normalize(self.left(a), dim=-1) @ F.normalize(self.right(b), dim=-1).T
        rows = torch.arange(len(a), device=a.device)
        return F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)


class Experts(nn.Module):
    """Every expert on every token, weighted by a router."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, 2 * WIDTH) / 8)
        self.down = nn.Parameter(torch.randn(experts, 2 * WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,edh->beth", x, self.up))
        return torch.einsum("beth,ehd,bte->btd", hidden, self.down, self.router(x).softmax(-1))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        found = torch.zeros_like(x).index_add(0, end, torch.relu(self.message(x))[begin])
        return self.update(torch.cat([x, found], -1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 24, num_layers=2, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def words() -> Tensor:
    return torch.randint(WORDS, (ROWS, LENGTH + 1))


def sequences() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH)


def images() -> Tensor:
    return torch.randn(ROWS, 3, 16, 16)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)


def edges() -> tuple[Tensor, ...]:
    return torch.randn(64, WIDTH), torch.randint(64, (256,)), torch.randint(64, (256,))


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "perceptron": lambda: (
        nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, 4)),
        (torch.randn(64, WIDTH),),
    ),
    "GPT": lambda: (Reader(GPT(Shape(width=WIDTH, heads=4, layers=2, vocab=WORDS))), (words(),)),
    "Llama": lambda: (Reader(Llama(Config(WIDTH, 5, 4, 2, 2 * WIDTH, WORDS))), (words(),)),
    "encoder": lambda: (encoder(), (sequences(),)),
    "vision": lambda: (Vision(), (images(),)),
    "convolutions": lambda: (Images(), (images(),)),
    "U-Net": lambda: (UNet(), (images(),)),
    "two towers": lambda: (Towers(), (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))),
    "experts": lambda: (Experts(), (sequences(),)),
    "graph": lambda: (Graph(), edges()),
    "LSTM": lambda: (Recurrent(), (sequences(),)),
}
