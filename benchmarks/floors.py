"""The least that each parallelism costs here: the local module, and exactly the collectives it needs, by hand.

Nothing is general: the partition is written into the model, a collective stands where its operand is ready, and
reduces in place where nobody else needs the operand. What a compiled program takes beyond this is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models.gpt import GPT, Block, loss_of
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]


class _Enter(torch.autograd.Function):
    """The same on every rank; gradients are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class _Leave(torch.autograd.Function):
    """A partial sum on every rank; the gradient is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


class _RowParallel(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, world: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().chunk(world, 1)[rank].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return _Leave.apply(F.linear(x, self.weight)) + self.bias


class _Entered(nn.Module):
    """A norm behind which a split begins."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return _Enter.apply(self.norm(x))


def _columns(linear: nn.Linear, rank: int, world: int) -> nn.Linear:
    weight, bias = (p.detach().chunk(world)[rank].clone() for p in (linear.weight, linear.bias))
    part = nn.Linear(weight.shape[1], weight.shape[0])
    part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)
    return part


def tensor_parallel(model: GPT, rank: int, world: int) -> Step:
    for block in model.blocks:
        assert isinstance(block, Block)
        at = block.attention
        at.q, at.k, at.v = (_columns(p, rank, world) for p in (at.q, at.k, at.v))
        block.up = _columns(block.up, rank, world)
        at.o, block.down = (_RowParallel(p, rank, world) for p in (at.o, block.down))  # pyright: ignore
        block.norm1, block.norm2 = _Entered(block.norm1), _Entered(block.norm2)  # pyright: ignore
    return _step_of(model)


def data_parallel(model: GPT, rank: int, world: int) -> Step:
    """All gradients as one flat tensor, reduced once behind backward."""
    forward, params = _step_of(model), list(model.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = forward(x, y)
        flat = torch.cat([p.grad.view(-1) for p in params if p.grad is not None])
        dist.all_reduce(flat)
        flat /= world
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = part.view(p.shape)
        return loss

    return step


class _Unit:
    """The parameters of one module as one flat tensor, of which a rank holds a slice. Gathered before the module
    runs, freed after, gathered again in backward, whose gradients are reduced and scattered at once."""

    def __init__(self, owners: Iterable[tuple[nn.Module, str, Tensor]], rank: int, world: int) -> None:
        self.places = [(owner, name) for owner, name, _ in owners]
        whole = [p.detach() for _, _, p in owners]
        self.shapes, self.world = [p.shape for p in whole], world
        flat = torch.cat([p.reshape(-1) for p in whole])
        self.numel = flat.numel()
        flat = F.pad(flat, (0, -self.numel % world))
        self.shard = flat.chunk(world)[rank].clone().requires_grad_()
        self.again: list[Tensor] | None = None
        self.bases: set[int] = set()

    def gathered(self) -> list[Tensor]:
        flat = self.shard.new_empty(self.shard.numel() * self.world)
        dist.all_gather_single(flat, self.shard.detach())
        return self.apart(flat)

    def apart(self, flat: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [p.view(s) for p, s in zip(flat[: self.numel].split(sizes), self.shapes, strict=True)]

    def enter(self) -> None:
        values = _Gathered.apply(self.shard, self)
        self.bases = {v.untyped_storage().data_ptr() for v in values}
        for (owner, name), value in zip(self.places, values, strict=True):
            owner.__dict__[name] = value

    def leave(self) -> None:
        for owner, name in self.places:
            del owner.__dict__[name]

    def pack(self, x: Tensor) -> Any:
        """Saved for backward: of a gathered parameter only where it lies."""
        if x.untyped_storage().data_ptr() in self.bases:
            return x.storage_offset(), x.shape, x.stride()
        return x

    def unpack(self, held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        if self.again is None:
            self.again = self.gathered()
        offset, shape, stride = held
        return self.again[0].as_strided(shape, stride, offset)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, unit: _Unit) -> tuple[Tensor, ...]:
        ctx.unit = unit
        return tuple(unit.gathered())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        unit = ctx.unit
        unit.again = None
        flat = torch.cat([g.reshape(-1) for g in gradients])
        flat = F.pad(flat, (0, -flat.numel() % unit.world))
        got = torch.empty_like(flat)
        dist.all_to_all_single(got, flat)  # on gloo half the time of its reduce_scatter
        return got.view(unit.world, -1).sum(0) / unit.world, None


def fully_sharded(model: GPT, rank: int, world: int) -> Step:
    units: dict[nn.Module, _Unit] = {}
    for module in (*model.blocks, model):
        own = [(o, n, p) for o in module.modules() for n, p in list(o._parameters.items()) if p is not None]
        units[module] = _Unit(own, rank, world)
        for owner, name, _ in own:
            owner.__dict__[name] = owner._parameters.pop(name)
    for unit in units.values():
        unit.leave()
    forward, blocks = _step_of(model), list(model.blocks)

    def through(module: nn.Module, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        unit = units[module]

        def run(*args: Any) -> Tensor:
            unit.enter()
            with torch.autograd.graph.saved_tensors_hooks(unit.pack, unit.unpack):
                out = call(*args)
            unit.leave()
            return out

        return run

    for module in (*blocks, model):
        module.forward = through(module, module.forward)

    def step(x: Tensor, y: Tensor) -> Tensor:
        for unit in units.values():
            unit.shard.grad = None
        return forward(x, y)

    return step


def _step_of(model: GPT) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        for p in model.parameters():
            p.grad = None
        loss = loss_of(model(x), y)
        loss.backward()
        return loss

    return step
