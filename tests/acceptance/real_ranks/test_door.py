"""What a caller gets of a program on real ranks, changes in place, and hands on to autograd: as of one device."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel

import shardc
from shardc import CompiledModule, FullyShard, Plan, PlanError, RankMismatchError, Replicated
from tests.acceptance.door.kinds import (
    KINDS,
    Attends,
    Heads,
    Held,
    Probabilities,
    Prototypes,
    Twins,
    door,
    same,
    tensors,
    whole,
)
from tests.runtime.ranks import on_ranks, run_ranks

PLANS = (Replicated(), FullyShard(), FullyShard("a", reshard_after_forward=False))


def data_parallel() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))


def tensor_parallel() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


def all_kinds(rank: int) -> None:
    mesh = data_parallel()
    for kind in KINDS:
        for plan in PLANS if kind is Twins else PLANS[:2]:
            door(kind, Plan(dp=plan), mesh, rank, 2)
    door(Heads, {"a": ColwiseParallel(output_layouts=Replicate()), "d": ColwiseParallel()}, tensor_parallel())
    clipped(rank, mesh)
    stale(rank, mesh)


def losses_and_inputs(rank: int) -> None:
    mesh = data_parallel()
    kept_back(rank, mesh)
    apart(rank, mesh)
    passed(rank, mesh)
    each_rank_has_its_own_loss(rank, mesh)


def clipped(rank: int, mesh: DeviceMesh) -> None:
    """Equal gradients count once each in a whole training step too."""
    x = torch.ones(4, 4).double()
    for plan in PLANS:
        ours, alone = Twins(), Twins()
        step = shardc.train_step(
            ours, plan, lambda m, x: m(x).mean(), partial(torch.optim.SGD, lr=1.0), mesh=mesh, clip_norm=0.1
        )
        step(x[:2])
        alone(x).mean().backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        torch.optim.SGD(alone.parameters(), lr=1.0).step()
        for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(p.detach()), q.detach(), msg=lambda text, n=name: f"{n}: {text}")


def stale(rank: int, mesh: DeviceMesh) -> None:
    """What backward reads must be as forward saw it: parameters, inputs, and outputs that it needs."""
    x = torch.ones(2, 4).double()

    def weights(m: nn.Module) -> Tensor:
        optim = torch.optim.SGD(m.parameters(), 0.5)
        first, second = m(x).mean(), m(x.requires_grad_()).square().mean()
        first.backward()
        optim.step()
        return second

    def inputs(m: nn.Module) -> Tensor:
        given = DTensor.from_local(x.detach().clone(), mesh, [Shard(0)]) if isinstance(m, CompiledModule) else x * 1
        loss = m(given).mean()
        given.add_(1)
        return loss

    def outputs(m: nn.Module) -> Tensor:
        given = m(x)
        given.mul_(2)
        return given[0, 0]

    for plan in PLANS[:2]:
        for change in (weights, inputs, outputs):
            for m in (shardc.compile(Probabilities(), Plan(dp=plan), mesh=mesh), Probabilities()):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    change(m).backward()


def kept_back(rank: int, mesh: DeviceMesh) -> None:
    """Of steps that are not synchronised what no loss depends on has no gradient either."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).double()
    for plan in PLANS[:2]:
        alone, compiled = Heads(), shardc.compile(Heads(), Plan(dp=plan), mesh=mesh)
        for used, part, sync in ((2, x[:4], compiled.no_sync()), (3, x[4:], nullcontext())):
            tensors(alone(part))[used].square().mean().backward()
            with sync:
                tensors(compiled(part.chunk(2)[rank]))[used].square().mean().backward()
        for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                torch.testing.assert_close(whole(p.grad), q.grad, msg=lambda text, n=name: f"{n}: {text}")


def apart(rank: int, mesh: DeviceMesh) -> None:
    """Ranks whose losses use different results are told, and do not wait for each other's collectives."""
    compiled = shardc.compile(Heads(), Plan(dp=FullyShard()), mesh=mesh)
    results = tensors(compiled(torch.ones(2, 4).double()))
    with pytest.raises(RankMismatchError, match="what the loss uses|what it calls backward on"):
        sum(t.sum() for t in results[: 1 + rank]).backward()  # pyright: ignore


def passed(rank: int, mesh: DeviceMesh) -> None:
    """What is no rows of the batch is the same on every rank; where the graph does not tell, the user is asked."""
    for rows, dynamic in ((1, False), (4, True), (6, False)):  # of one row, as positions, and of as many as the mask
        alone, compiled = Attends(), shardc.compile(Attends(), Replicated(), mesh=mesh, dynamic=dynamic)
        ids, *more, labels = Attends.inputs(2 * rows)
        ours = compiled(ids.chunk(2)[rank], *more, labels.chunk(2)[rank])
        theirs = alone(ids, *more, labels)
        ours[1].square().mean().backward()
        theirs[1].square().mean().backward()
        grads = [[p.grad for p in m.parameters()] for m in (compiled, alone)]
        same([*ours, *grads[0]], [*theirs, *grads[1]], f"{rows} rows", rank)
    x = torch.ones(4, 4).double()
    for count in (3, 4):
        compiled = shardc.compile(Prototypes(), Replicated(), mesh=mesh)
        with pytest.raises(PlanError, match=r"inputs=\{'prototypes': Shard\(0\)\}\) or inputs=\{'prototypes': Rep"):
            compiled(x, torch.ones(count, 4).double())
        compiled = shardc.compile(Prototypes(), Replicated(), mesh=mesh, inputs={"prototypes": Replicate()})
        assert compiled(x, torch.ones(count, 4).double()).shape == (4, count)


def each_rank_has_its_own_loss(rank: int, mesh: DeviceMesh) -> None:
    """Of results that are no batch too: a temperature, weights of a loss outside of the model."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()
    for plan in PLANS[:2]:
        alone, compiled = Held(), shardc.compile(Held(), Plan(dp=plan), mesh=mesh)

        def loss(m: nn.Module, number: int) -> Tensor:
            h, p, q, *_ = m(x.chunk(2)[number])
            return (h * p).sum() * (number + 1) + q * h.detach().sum()

        loss(compiled, rank).backward()
        ((loss(alone, 0) + loss(alone, 1)) / 2).backward()  # as DistributedDataParallel averages
        for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(whole(p.grad), q.grad, msg=lambda text, n=name: f"{n}: {text}")


@on_ranks
def test_values_of_a_program_are_the_callers_own():
    run_ranks(all_kinds, 2)


@on_ranks
def test_what_enters_a_loss_and_what_is_passed_is_as_on_one_device():
    run_ranks(losses_and_inputs, 2)
