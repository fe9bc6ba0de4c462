"""Modules by the ways in which constructors give values; all take (4, 8) numbers, or ids below 8."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


class Convolutions(nn.Module):
    """Statistics and a counter beside parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)
        self.back = nn.ConvTranspose1d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.norm(self.conv(x[:, None])))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 5, padding_idx=2), nn.Linear(5, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x.argmax(-1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x)[0]


class Copied(nn.Module):
    """Layers that are copies of one, drawn anew afterwards in part."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
        nn.init.xavier_normal_(self.layers[1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Rotary(nn.Module):
    """Tables that no state_dict holds, one computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        rates = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
        self.register_buffer("rates", rates, persistent=False)
        self.register_buffer("angles", torch.outer(torch.arange(4).float(), rates).cos(), persistent=False)
        self.lin = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lin(self.angles * self.rates)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mask = torch.full((4, 4), float("-inf")).triu(1)
        self.register_buffer("mask", mask)
        self.register_buffer("kept", torch.ones(4, 4, dtype=torch.bool).tril())
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]) * torch.arange(4))
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.mask.softmax(-1) * self.kept * self.scale) @ self.lin(x)


class Truncated(nn.Module):
    """Draws that are made again until all lie within bounds, and orthogonal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin = nn.Parameter(torch.empty(8, 6)), nn.Linear(6, 5)
        nn.init.trunc_normal_(self.table, std=0.7, a=-0.5, b=0.5)
        nn.init.orthogonal_(self.lin.weight, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x @ self.table)


class Scaled(nn.Module):
    """Values changed in place after super().__init__(), through views, .data and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.a.weight.mul_(0.5).add_(self.b.weight.t())
            self.b.weight[2:5].copy_(torch.rand(3, 8))
        self.a.bias.data = torch.linspace(-1, 1, 8)
        self.b.bias.data[::2] = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Applied(Plain):
    """A family's own initialisation over what the parts drew."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            if module.bias is not None:
                module.bias.data.zero_()


class WithReal(nn.Module):
    """A part that comes from elsewhere, with values, in part overwritten; another that is frozen."""

    def __init__(self, part: nn.Linear) -> None:
        super().__init__()
        self.part, self.lin = part, nn.Linear(8, 8)
        nn.init.normal_(self.part.bias)
        self.lin.weight.data.add_(part.weight.data)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.lin(x) * self.frozen


def with_real() -> nn.Module:
    part = nn.Linear(8, 8)
    with torch.no_grad():
        part.weight.copy_(torch.arange(64.0).view(8, 8) / 64), part.bias.zero_()
    return WithReal(part)


class Normed(nn.Module):
    """Parametrizations, which run while they are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(8, 8))
        self.b = parametrizations.spectral_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


class Asking(nn.Module):
    """Asks for values while it is built: rates of dropped paths, shapes that depend on them, arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)] + torch.linspace(1, 2, 2).tolist()
        self.lin = nn.Linear(8, 8)
        self.few = nn.Parameter(self.lin.bias.detach()[self.lin.bias.detach() > 0].sum().repeat(8))
        self.spread = nn.Parameter(torch.from_numpy(np.sqrt(np.abs(torch.randn(8).numpy()))) * self.few.detach())
        self.steps = torch.arange(8) * 2  # no buffer: an attribute

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.few + self.spread * sum(self.rates) + self.steps


class Seeding(nn.Module):
    """Generators of its own, and the global one set and restored meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(8, generator=generator))
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.d = nn.Parameter(torch.empty(8).uniform_(-1, 1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x * self.a)) + self.d


class Experts(nn.Module):
    """One parameter for all, filled piece by piece; another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 8, 8))
        self.gate = nn.Parameter(torch.zeros(8, 3, dtype=torch.float32))
        for expert in self.up:
            nn.init.kaiming_uniform_(expert)
        self.low = nn.Linear(8, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("eij,te->tij", self.up, F.softmax(x @ self.gate, -1))
        y = torch.einsum("tij,tj->ti", mixed, x)
        return self.low(y.bfloat16()).float()


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{c.__name__.lower(): c for c in (Plain, Convolutions, Tied, Attention, Copied, Rotary, Masked, Truncated)},
    **{c.__name__.lower(): c for c in (Scaled, Applied, Normed, Recurrent, Asking, Seeding, Experts)},
    "withreal": with_real,
}
