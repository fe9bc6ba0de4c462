"""Sequences split over real ranks: each passes its own part, and gets its own part of the logits."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import shardc
from shardc import ContextParallel, Plan
from tests.acceptance.plans.test_sequences import Model
from tests.runtime.ranks import on_ranks, run_ranks

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def steps_like_one_device(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    alone = Model().double()
    model = shardc.compile(copy.deepcopy(alone), Plan(cp=ContextParallel()), mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
    for _ in range(2):
        tokens, labels = torch.randint(20, (2, 33)), torch.randint(20, (2, 33))
        logits, want = model(tokens.chunk(3, 1)[rank]), alone(tokens)
        torch.testing.assert_close(logits, want.chunk(3, 1)[rank], **EXACT)
        F.cross_entropy(logits.flatten(0, 1), labels.chunk(3, 1)[rank].flatten()).backward()
        F.cross_entropy(want.flatten(0, 1), labels.flatten()).backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None, name
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(grad, q.grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [model.programs[-1].hash]


@on_ranks
def test_ranks_train_on_parts_of_sequences():
    assert len({*map(str, run_ranks(steps_like_one_device, 3))}) == 1
