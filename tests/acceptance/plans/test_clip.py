"""ACCEPTANCE 60 and 211 on simulated ranks: the norm is that of one device. Real ranks: test_fully_shard.py."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Mesh, Plan
from tests.acceptance.models import MLP


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_clipping_is_that_of_one_device(p: float):
    model = MLP(8, 7).double()
    model.net2.bias.requires_grad_(False)
    alone, x = copy.deepcopy(model), torch.randn(4, 8, dtype=torch.float64)
    plan = Plan(dp=FullyShard("net*"), tp={"net1": ColwiseParallel(), "net2": RowwiseParallel()})
    compiled = shardc.compile(model, plan, mesh=Mesh(dp=2, tp=2))
    for one in (compiled, alone):
        one(x).square().sum().backward()
    norms = compiled.clip_grad_norm_(0.5, p), nn.utils.clip_grad_norm_(alone.parameters(), 0.5, p)
    torch.testing.assert_close(*norms, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(compiled.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_small_gradients_are_left_as_they_are_and_none_is_fine():
    compiled = shardc.compile(MLP(8, 7), Plan(dp=FullyShard()), mesh=Mesh(dp=2))
    assert compiled.clip_grad_norm_(1.0).item() == 0
    compiled(torch.randn(4, 8)).square().mean().backward()
    before = [p.grad.clone() for p in compiled.parameters() if p.grad is not None]
    compiled.clip_grad_norm_(1e6)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, compiled.parameters(), strict=True) if p.grad is not None)


@pytest.mark.parametrize("p", [0, -1, math.nan])
def test_what_is_no_norm_is_refused(p: float):
    compiled = shardc.compile(MLP(8, 7), Plan(dp=FullyShard()), mesh=Mesh(dp=2))
    with pytest.raises(ValueError, match="norm_type is"):
        compiled.clip_grad_norm_(1.0, p)
