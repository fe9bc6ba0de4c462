"""What a caller gets of a program and may change in place: models whose results repeat, alias and detach."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import shardc

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Twins(nn.Module):
    """Pairs of parameters whose gradients are equal, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.p, self.q = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.register_buffer("old", torch.zeros(6))
        self.register_buffer("new", torch.ones(6))
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + self.b(x)


class Spread(Twins):
    """Gradients that are one number, for every element."""

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + (self.p.sum() + self.q.sum())


class Detached(Twins):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        loss = h.mean(1)
        return loss, {"log": loss.detach(), "data": h.data, "aside": h.detach()}, h


class Repeated(Twins):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return h, [h, h], h.sum(-1)


class Views(Twins):
    """Of one value, and of an input."""

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return h, h[:, :1], h.unsqueeze(1), h.chunk(3, -1), x, x.unsqueeze(-1)


class Held(Twins):
    """Results that are no batch, or have its rows in another dim."""

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return h, self.p * 2, self.q.exp().sum(), self.b.bias, self.new, h.t(), h.t()[None, 1:]


class Swaps(Twins):
    def forward(self, x: Tensor) -> Any:
        self.old, self.new = self.new, self.old
        return self.a(x) + self.old


class Counts(Twins):
    """Backward needs the buffer that forward has changed by then, and the caller gets it as it was."""

    def forward(self, x: Tensor) -> Any:
        before = self.new.clone()
        y = self.a(x) * self.new
        self.new = self.new + 1
        return y, before.expand(len(x), 6)


class Probabilities(Twins):
    """An output that backward needs too."""

    def forward(self, x: Tensor) -> Any:
        return self.a(x).softmax(-1)


class Heads(Twins):
    """Results that share some of what they are made of, and some of which nothing else needs."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.LSTMCell(6, 5).double()
        self.d = nn.Linear(6, 12).double()

    def forward(self, x: Tensor) -> Any:
        trunk = self.a(x)
        left, right = self.d(trunk).chunk(2, -1)
        hidden, cell = self.c(trunk * self.p)
        return (
            trunk.logsumexp(-1).mean(0),
            trunk,
            self.b(x),
            {"left": left, "right": right},
            hidden,
            cell + self.q.sum(),
        )


SUBSETS = ((0,), (0, 2), (3,), (1, 4), (6,), (5, 6), (0, 1, 2, 3, 4, 5, 6), (0,))


KINDS: Sequence[type[Twins]] = (Twins, Spread, Detached, Repeated, Views, Held, Swaps, Counts, Heads)


def tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def two_steps(module: nn.Module, x: Tensor, in_place: bool) -> list[Any]:
    """All that a caller sees of two steps in which it halves all that it gets, in place or not, and doubles gradients
    in place. Halving one value is not to be seen in another one."""
    seen: list[Any] = []
    for _ in range(2):
        module.zero_grad()
        mine = x.clone().requires_grad_()
        given = tensors(module(mine))
        seen += [given[i] is given[j] for i in range(len(given)) for j in range(i)]
        seen += [t.requires_grad for t in given]
        seen += [t.detach().clone() for t in given]
        changed = [t.div_(2) if in_place else t / 2 for t in dict.fromkeys(given)]
        sum(t.square().mean() for t in changed if t.requires_grad).backward()  # pyright: ignore
        held = [p.grad for p in module.parameters() if p.grad is not None]
        before = [g.clone() for g in held]
        for g in held:
            g.mul_(2)
        seen += [torch.equal(local(g), 2 * local(h)) for g, h in zip(held, before, strict=True)]
        seen += [whole(p.grad) for p in module.parameters()] + [whole(b.clone()) for b in module.buffers()]
    return seen


def partial_losses(module: nn.Module, x: Tensor) -> list[Any]:
    """Gradients, or that there are none, and parameters after Adam, of losses that use some of the results."""
    seen: list[Any] = []
    optim = torch.optim.Adam(module.parameters(), lr=0.1)
    for used in SUBSETS:
        mine = x.clone().requires_grad_()
        results = tensors(module(mine))
        sum(results[i].square().mean() for i in used).backward()  # pyright: ignore
        seen += [p.grad is None for p in module.parameters()] + [whole(p.grad) for p in module.parameters()]
        seen += [mine.grad is None]
        optim.step()
        optim.zero_grad()
        seen += [whole(p.detach().clone()) for p in module.parameters()]
    return seen


def same(ours: Sequence[Any], theirs: Sequence[Any], what: str, rank: int = 0) -> None:
    """rank: which equal part of a whole batch's rows is compared, where sizes differ."""
    assert len(ours) == len(theirs), what
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            for dim, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)):
                b = b if n == m else b.tensor_split(m // n, dim)[rank]
            torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, i=i: f"{what}, {i}: {text}")
        else:
            assert a == b, f"{what}, {i}: {a} and {b}"


def door(kind: type[Twins], plan: Any, mesh: Any, rank: int = 0, ranks: int = 1) -> None:
    """A model of this kind, compiled, beside one device."""
    alone = kind()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    compiled = shardc.compile(copy.deepcopy(alone), plan, mesh=mesh)
    if kind is Heads:
        ours, theirs = partial_losses(compiled, x.chunk(ranks)[rank]), partial_losses(alone, x)
    else:
        ours, theirs = two_steps(compiled, x.chunk(ranks)[rank], True), two_steps(alone, x, False)
    same(ours, theirs, f"{kind.__name__}, {plan}", rank)


class Attends(nn.Module):
    """Of its inputs two are rows of the batch: a mask is of its columns, positions are one row, weights of classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)
        self.double()

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor, weight: Tensor, labels: Tensor) -> Any:
        q, k, v = self.qkv(self.tokens(ids) + self.places(places)).chunk(3, -1)
        logits = self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight), logits, mask * 2, places

    @staticmethod
    def inputs(rows: int) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(rows)
        ids, labels = (torch.randint(n, (rows, 6), generator=draw) for n in (11, 5))
        mask, weight = (torch.rand(n, generator=draw, dtype=torch.double) for n in ((6, 6), (5,)))
        return ids, mask, torch.arange(6)[None], weight, labels


class Prototypes(nn.Module):
    """Whether what x is compared with is a part of the batch nobody can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        return self.a(x) @ prototypes.t()
