"""passes/fuse_cross_entropy.py: split classes need no reduction in backward; other gradients are left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardc
from shardc.compiler.trace.trace import trace
from shardc.passes.layouts.fuse_cross_entropy import FuseCrossEntropy

aten = torch.ops.aten


class Loss(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, logits, target):
        return F.cross_entropy(logits, target, **self.options)


class AllPairs(nn.Module):
    """A negative log likelihood along another dim than the softmax's."""

    def forward(self, logits, target):
        return F.nll_loss(logits.log_softmax(0), target)


class NoLoss(nn.Module):
    def forward(self, logits, target):
        return logits.log_softmax(1) * target[:, None]


class Halved(nn.Module):
    """The gradient is scaled between the two."""

    def forward(self, logits, target):
        return F.nll_loss(logits.log_softmax(1) / 2, target)


LOGITS = {1: (6, 5), 2: (4, 5, 3)}


def sample(rank):
    shape = LOGITS[rank]
    target = torch.randint(0, 5, shape[:1] + shape[2:])
    return torch.randn(shape, dtype=torch.float64).requires_grad_(), target


def run(gm, traced, logits, target):
    """Outputs and gradients of a traced graph at global shapes, with a tangent of ones."""
    extra = [torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in gm.graph.nodes if "tangent" in n.name]
    constants = [i.value for i in traced.signature.inputs if i.kind.value == "constant"]
    gm.recompile()
    return gm(*constants, logits.detach(), target, *extra)


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"weight": torch.rand(5, dtype=torch.float64)},
    {"ignore_index": 2},
    {"weight": torch.rand(5, dtype=torch.float64), "ignore_index": 2, "reduction": "none"},
]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_the_sum_over_classes_goes_and_values_stay(rank, options):
    logits, target = sample(rank)
    traced = trace(Loss(**options), (logits, target))
    gm = traced.gm
    before = run(gm, traced, logits, target)
    assert FuseCrossEntropy().run(gm, None).changes["cross_entropy"] == 1
    gm.graph.lint()
    assert not gm.graph.find_nodes(op="call_function", target=aten._log_softmax_backward_data.default)
    for a, b in zip(run(gm, traced, logits, target), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", [AllPairs(), NoLoss(), Halved()], ids=lambda m: type(m).__name__)
def test_left_alone(model):
    logits = torch.randn(5, 5, dtype=torch.float64).requires_grad_()
    traced = trace(model, (logits, torch.randint(0, 5, (5,))))
    assert not FuseCrossEntropy().run(traced.gm, None).changes


def test_classes_split_over_four_ranks_move_three_small_sums_forward_and_none_backward():
    with pytest.warns(UserWarning, match="the plan is empty"):
        compiled = shardc.compile(Loss(), {}, mesh=shardc.Mesh(tp=4), inputs={"logits": Shard(1)})
    logits, target = sample(1)
    compiled(logits, target).backward()
    moved = compiled.programs[-1].collectives()
    assert [(c.kind, c.phase) for c in moved] == [("all_reduce", "forward")] * 3
    assert max(c.numel for c in moved) == 6
    compiled.programs[-1].verify(logits, target)
