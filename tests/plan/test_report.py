"""The table of a resolved plan: its text for two small models, and that its numbers are right."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from shardc import FullyShard, Mesh, Plan, Replicated
from shardc.compiler.plan.resolve import resolve


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1, self.net2 = nn.Linear(16, 10), nn.Linear(10, 16)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )


class GPT(nn.Module):
    """A tiny decoder with 13 tokens, whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([Block(8)])
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.emb.weight
        self.temperature = nn.Parameter(torch.tensor(1.0))


def test_an_mlp():
    found = resolve({"net1": ColwiseParallel(), "net2": RowwiseParallel()}, MLP(), Mesh(tp=4))
    assert_expected_inline(
        str(found.report()),
        """\
mesh tp=4
parameter    stored          bytes/rank  plan
net1.weight  f32[10@tp, 16]         192  tp["net1"]
net1.bias    f32[10@tp]              12  tp["net1"]
net2.weight  f32[16, 10@tp]         192  tp["net2"]
net2.bias    f32[16]                 64  tp["net2"]
total                               460  of 1384
tp["net1"] = ColwiseParallel()
tp["net2"] = RowwiseParallel()""",
    )


def test_a_gpt_with_a_tied_head():
    tp = {
        "emb": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.norm": SequenceParallel(),
        "layers.*.qkv": ColwiseParallel(),
        "layers.*.out": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(output_layouts=Replicate()),
        "layers.*.mlp": ColwiseParallel(),
    }
    with pytest.warns(UserWarning, match="mlp"):
        found = resolve(Plan(dp=FullyShard("layers.*"), tp=tp), GPT(), Mesh(dp=2, tp=2))
    assert_expected_inline(
        str(found.report()),
        """\
mesh dp=2 tp=2
parameter             stored            bytes/rank  plan
temperature           f32[]                      4  dp
emb.weight            f32[13@tp, 8@dp]         112  dp, tp["emb"]
layers.0.norm.weight  f32[8@dp]                 16  dp, tp["layers.*.norm"]
layers.0.norm.bias    f32[8@dp]                 16  dp, tp["layers.*.norm"]
layers.0.qkv.weight   f32[24@tp.dp, 8]         192  dp, tp["layers.*.qkv"]
layers.0.qkv.bias     f32[24@tp.dp]             24  dp, tp["layers.*.qkv"]
layers.0.out.weight   f32[8@dp, 8@tp]           64  dp, tp["layers.*.out"]
layers.0.out.bias     f32[8@dp]                 16  dp, tp["layers.*.out"]
total                                          444  of 1636
dp = FullyShard("layers.*")
tp["emb"] = RowwiseParallel(input_layouts=Replicate())
tp["layers.*.norm"] = SequenceParallel()
tp["layers.*.qkv"] = ColwiseParallel()
tp["layers.*.out"] = RowwiseParallel(output_layouts=Shard(1))
emb.weight = head.weight
temperature: a scalar stays whole over dp
emb.weight: it is split over dp on dim 1: torch has no placements for such pieces of dim 0
matches nothing: tp["layers.*.mlp"]""",
    )


def test_what_is_left_alone_is_said():
    with pytest.warns(UserWarning, match="mesh dim tp"):
        found = resolve(Plan(dp=Replicated(ignored_modules="net1")), MLP(), Mesh(dp=2, tp=2))
    assert_expected_inline(
        str(found.report()),
        """\
mesh dp=2 tp=2
parameter    stored       bytes/rank  plan
net1.weight  f32[10, 16]         640  dp
net1.bias    f32[10]              40  dp
net2.weight  f32[16, 10]         640  dp
net2.bias    f32[16]              64  dp
total                           1384  of 1384
dp = Replicated(ignored_modules=["net1"])
net1.weight: its gradient stays local over dp
net1.bias: its gradient stays local over dp
warning: nothing is planned for the mesh dim tp: its ranks all do the same""",
    )


def test_rows_have_all_numbers():
    (row, *_) = resolve({"net1.weight": Shard(1)}, MLP(), Mesh(tp=3)).report()
    assert row == {
        "fqn": "net1.weight",
        "shape": (10, 16),
        "dtype": torch.float32,
        "keys": ('tp["net1.weight"] = Shard(1)',),
        "layout": "f32[10, 16@tp]",
        "bytes": 640,
        "bytes_per_rank": 10 * 6 * 4,
        "aliases": (),
        "notes": (),
    }


def test_no_rank_holds_more_than_the_report_says():
    mesh = Mesh(dp=3, tp=2)
    found = resolve(Plan(dp=FullyShard(), tp={"emb": "rowwise", "layers.*.qkv": "colwise"}), GPT(), mesh)
    report = found.report()
    held = []
    for rank in range(mesh.size):
        shapes = [p.stored.local_shape(mesh, mesh.coords(rank)) for p in found.params.values()]
        held.append(4 * sum(torch.Size(shape).numel() for shape in shapes))
    assert max(held) == report.total == sum(row["bytes_per_rank"] for row in report)
    assert report.whole == sum(p.numel() * 4 for p in GPT().parameters())


def test_buffers_in_the_plan_are_rows_too():
    model = MLP()
    model.register_buffer("mask", torch.zeros(6, dtype=torch.bool))
    report = resolve({"mask": Shard(0)}, model, Mesh(tp=4)).report()
    assert (report[-1]["fqn"], report[-1]["layout"], report[-1]["bytes_per_rank"]) == ("mask", "b8[6@tp]", 2)
