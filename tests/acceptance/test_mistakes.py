"""Mistakes that users make, and the whole text they get: what, where in their source, and a fix.

EXPECTTEST_ACCEPT=1 rewrites the expectations; read the diff. Line numbers are shown as N.
"""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, Replicated


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1, self.act, self.net2 = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)

    def forward(self, x):
        return self.net2(self.act(self.net1(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.emb(ids))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        if x.sum() > 0:
            return self.lin(x)
        return x


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


class Box:
    """Neither a tensor nor comparable by value."""

    __hash__ = None


class Boxed(nn.Module):
    def forward(self, x, box):
        return x * 2


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(8))

    def forward(self, x):
        return torch.cdist(x, self.w)


X = torch.ones(4, 8)
TP = Mesh(tp=2)
MEGATRON = {"net1": ColwiseParallel(), "net2": RowwiseParallel()}


def twice():
    model = MLP()
    shardc.compile(model, MEGATRON, mesh=TP)
    shardc.compile(model, MEGATRON, mesh=TP)


def added_after():
    model = MLP()
    compiled = shardc.compile(model, MEGATRON, mesh=TP)
    model.net1.register_parameter("lora", nn.Parameter(torch.zeros(2)))
    compiled(X)


def double_backward():
    compiled = shardc.compile(MLP(), MEGATRON, mesh=TP)
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    grad.sum().backward()


def on_meta():
    with torch.device("meta"):
        model = MLP()
    shardc.compile(model, MEGATRON, mesh=TP)


def wrong_number_of_arguments():
    shardc.compile(Pair(), ColwiseParallelFree(), mesh=TP, inputs=(Shard(0), None))(X)


def ColwiseParallelFree():
    return {"": PrepareModuleInput(input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None))}


MISTAKES = {
    "unknown mesh dim": lambda: shardc.compile(MLP(), Plan(tpp=MEGATRON), mesh=TP),
    "unknown style": lambda: shardc.compile(MLP(), {"net1": "colwize"}, mesh=TP),
    "style of another kind": lambda: shardc.compile(MLP(), {"net1": 3}, mesh=TP),
    "pattern without match, strict": lambda: shardc.compile(MLP(), {"net3": ColwiseParallel()}, mesh=TP, strict=True),
    "container": lambda: shardc.compile(nn.Sequential(MLP()), {"0": ColwiseParallel()}, mesh=TP),
    "module without parameters": lambda: shardc.compile(MLP(), {"act": ColwiseParallel()}, mesh=TP),
    "placement on a dim that is not there": lambda: shardc.compile(MLP(), {"net1.weight": Shard(2)}, mesh=TP),
    "placement for a module": lambda: shardc.compile(MLP(), {"net1": Shard(0)}, mesh=TP),
    "tied weights in two layouts": lambda: shardc.compile(
        Tied(), {"emb": ColwiseParallel(), "head": ColwiseParallel()}, mesh=TP
    ),
    "too many input layouts": lambda: shardc.compile(MLP(), MEGATRON, mesh=TP, inputs=(Shard(0), Shard(0))),
    "input of another name": lambda: shardc.compile(MLP(), MEGATRON, mesh=TP, inputs={"xs": Shard(0)}),
    "too few arguments at call time": wrong_number_of_arguments,
    "bare placement on two mesh dims": lambda: shardc.compile(MLP(), MEGATRON, mesh=Mesh(dp=2, tp=2)),
    "layout of an unknown mesh dim": lambda: shardc.compile(MLP(), MEGATRON, mesh=TP, outputs=Layout(dp=Shard(0))),
    "negative bucket": lambda: Replicated(bucket_mb=-1),
    "shard function that is none": lambda: FullyShard(placement=3),
    "device as a list": lambda: shardc.replicate(MLP(), device_id=[0]),
    "several mesh dims, no mesh": lambda: shardc.compile(MLP(), Plan(dp=Replicated(), tp=MEGATRON)),
    "mesh of another type": lambda: shardc.compile(MLP(), MEGATRON, mesh=(2, 2)),
    "mesh dim of no ranks": lambda: Mesh(tp=0),
    "class instead of a module": lambda: shardc.compile(MLP, MEGATRON, mesh=TP),
    "compiled twice": twice,
    "parameter added after compile": added_after,
    "parameters on meta": on_meta,
    "unsupported option": lambda: shardc.compile(MLP(), MEGATRON, mesh=TP, dynamic=True),
    "unknown rng": lambda: shardc.compile(MLP(), MEGATRON, mesh=TP, rng="dice"),
    "data-dependent branch": lambda: shardc.compile(Branch(), {"lin": ColwiseParallel()}, mesh=TP)(X),
    "wrong shape at call time": lambda: shardc.compile(MLP(), MEGATRON, mesh=TP)(torch.ones(4, 9)),
    "input that cannot be compared": lambda: shardc.compile(Boxed(), ColwiseParallelOfNothing(), mesh=TP)(X, Box()),
    "operator without a rule, strict": lambda: shardc.compile(
        Distances(), {"w": Shard(0)}, mesh=TP, strict=True
    )(X),
    "collective that no plan entry implies, strict": lambda: shardc.compile(
        MLP(), {"net1.weight": Shard(0), "net1.bias": Shard(0)}, mesh=TP, strict=True, inputs=Shard(1)
    )(X),
    "double backward": double_backward,
}


def ColwiseParallelOfNothing():
    return {"": PrepareModuleInput(input_layouts=(Replicate(), None), desired_input_layouts=(Replicate(), None))}


def message(mistake):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
            mistake()
    text = re.sub(r"(\w+\.py):\d+", r"\1:N", str(caught.value))
    return f"{caught.type.__name__}: {re.sub(r'[ ]+$', '', text, flags=re.M)}"


GOLDEN = __file__.replace("test_mistakes.py", "mistakes.txt")


def golden() -> dict[str, str]:
    with open(GOLDEN) as file:
        blocks = file.read().split("\n## ")
    return {block.split("\n", 1)[0]: block.split("\n", 1)[1].strip("\n") for block in blocks[1:]}


def test_every_mistake_gets_its_whole_text():
    import os

    found = {name: message(mistake) for name, mistake in MISTAKES.items()}
    if os.environ.get("EXPECTTEST_ACCEPT"):
        text = "# What users are told. Rewritten by EXPECTTEST_ACCEPT=1 pytest tests/acceptance/test_mistakes.py\n"
        text += "".join(f"\n## {name}\n{body}\n" for name, body in found.items())
        with open(GOLDEN, "w") as file:
            file.write(text)
    assert found == golden()


@pytest.mark.parametrize("name", [n for n in MISTAKES if n not in ("double backward", "device as a list")])
def test_every_text_says_what_to_do(name):
    assert "= help: " in golden()[name]


def test_a_pattern_without_match_warns_with_the_nearest_name_and_the_rest_applies():
    with pytest.warns(UserWarning, match=r"net3.*matches nothing.*net[12]"):
        compiled = shardc.compile(MLP(), {**MEGATRON, "net3": ColwiseParallel()}, mesh=TP)
    assert [c.kind for c in compiled.lower(X).collectives()] == ["all_reduce"]


def test_values_that_are_no_tensors_come_back_as_they_are():
    class Mixed(nn.Module):
        def forward(self, x):
            return F.relu(x), 3, None, "name"

    with pytest.warns(UserWarning, match="the plan is empty"):
        compiled = shardc.compile(Mixed(), {}, mesh=TP)
    out = compiled(X)
    assert torch.equal(out[0], X) and out[1:] == (3, None, "name")
