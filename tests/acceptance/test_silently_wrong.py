"""Where stock torch runs and gives wrong numbers: here right in float64 over three steps, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

import shardc
from shardc import Mesh, Plan, PlanError, Program, Replicated, ShardingError
from tests.acceptance.compare import compare, counts
from tests.acceptance.models import LLAMA_TP, MLP, MLP_TP, TRANSFORMER_TP, ConvNet, Llama, Transformer, transformer_tp

pytestmark = pytest.mark.slow

ways = pytest.mark.parametrize("w", [2, 4])


def three_steps(model: nn.Module, plan: Any, mesh: Mesh, *args: Tensor, **options: Any) -> Program:
    args = tuple(x.double() if x.is_floating_point() else x for x in args)
    return compare(model.double(), plan, mesh, *args, steps=3, **options)  # pyright: ignore


class TiedHead(nn.Module):
    def __init__(self, vocab: int = 13) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.tokens(ids))))


@ways
@pytest.mark.parametrize(
    "plan",
    [
        {"tokens": RowwiseParallel()},
        {"tokens": ColwiseParallel()},
        {"head": ColwiseParallel()},
        {"head": RowwiseParallel()},
        {"tokens": RowwiseParallel(), "head": ColwiseParallel()},
        {"mid": ColwiseParallel()},
    ],
    ids=["rows", "features", "head by columns", "head by rows", "both", "neither"],
)
def test_a_tied_weight_with_any_of_its_names_in_the_plan_is_one_parameter(w: int, plan: dict[str, Any]):
    """Row 201."""
    model = TiedHead()
    three_steps(model, plan, Mesh(tp=w), torch.randint(13, (4, 5)))
    assert model.head.weight is model.tokens.weight
    assert len(list(model.parameters())) == 3


def test_a_tied_weight_laid_out_in_two_ways_is_refused_by_both_names():
    """Row 201."""
    plan = {"tokens": ColwiseParallel(), "head": ColwiseParallel()}
    with pytest.raises(PlanError, match=r"(?s)tokens\.weight.*head\.weight|head\.weight.*tokens\.weight"):
        shardc.compile(TiedHead(), plan, mesh=Mesh(tp=2))


@ways
def test_heads_viewed_with_minus_one_keep_their_size(w: int):
    """Row 202."""
    model = Transformer(layers=1, view="n_head, -1")
    program = three_steps(model, transformer_tp(), Mesh(tp=w), torch.randint(16, (3, 5)))
    assert not any(kind == "all_gather" for kind, _, _ in counts(program))


@pytest.mark.parametrize("heads", [4, 2])
def test_a_view_that_fixes_the_size_of_a_head_keeps_their_number(heads: int):
    """Row 202, the other way around."""
    model = Transformer(layers=1, heads=heads, view="-1, head_dim")
    three_steps(model, transformer_tp(), Mesh(tp=4), torch.randint(16, (3, 5)))


class Fused(nn.Module):
    """Attention over a fused projection, its thirds taken apart in one of the ways people write."""

    def __init__(self, apart: str, heads: int = 4, width: int = 4) -> None:
        super().__init__()
        self.apart, self.heads, self.width = apart, heads, width
        self.qkv = nn.Linear(16, 3 * heads * width)
        self.proj = nn.Linear(heads * width, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        y, size = self.qkv(x), self.heads * self.width
        if self.apart == "view":
            y = y.view(batch, time, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            q, k, v = y.unbind(0)
        else:
            thirds = {
                "chunk": lambda: y.chunk(3, -1),
                "split": lambda: y.split(size, -1),
                "slice": lambda: (y[..., :size], y[..., size : 2 * size], y[..., 2 * size :]),
            }[self.apart]()
            q, k, v = (t.view(batch, time, self.heads, self.width).transpose(1, 2) for t in thirds)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, time, size))


@ways
@pytest.mark.parametrize("apart", ["chunk", "split", "view", "slice"])
def test_a_fused_projection_taken_apart_keeps_its_heads_split(w: int, apart: str):
    """Row 203."""
    plan = {"qkv": ColwiseParallel(), "proj": RowwiseParallel()}
    program = three_steps(Fused(apart), plan, Mesh(tp=w), torch.randn(2, 5, 16))
    assert counts(program) == {("all_reduce", "tp", "forward"): 1, ("all_reduce", "tp", "backward"): 1}


@ways
def test_a_sequence_parallel_norm_given_a_whole_input_takes_it_apart(w: int):
    """Row 204."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))

    for plan in ({"norm": SequenceParallel()}, {"norm": SequenceParallel(), "last": ColwiseParallel()}):
        three_steps(Normed(), plan, Mesh(tp=w), torch.randn(2, 6, 16))


# --- row 205


class Adapted(nn.Module):
    """A Linear with a low-rank adapter beside it, if it has one."""

    def __init__(self, adapter: bool) -> None:
        super().__init__()
        self.base = MLP()
        self.base.requires_grad_(False)
        if adapter:
            self.add_adapter()

    def add_adapter(self) -> None:
        self.down, self.up = nn.Linear(16, 3, bias=False), nn.Linear(3, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.down(x)) if hasattr(self, "down") else y


BASE_TP = {f"base.{name}": style for name, style in MLP_TP.items()}


def test_an_adapter_added_before_compile_has_its_gradient_reduced():
    """Row 205."""
    plan = Plan(dp=Replicated(), tp=BASE_TP)
    program = three_steps(Adapted(True), plan, Mesh(dp=2, tp=2), torch.randn(8, 16), grads=False)
    over_dp = [c for c in program.collectives() if c.mesh_dim == "dp"]
    assert sum(c.numel for c in over_dp) == 2 * 16 * 3


def test_an_adapter_added_after_compile_makes_the_next_call_raise():
    """Row 205."""
    model, x = Adapted(False), torch.randn(8, 16)
    compiled = shardc.compile(model, BASE_TP, mesh=Mesh(tp=2))
    compiled(x)
    model.add_adapter()
    with pytest.raises(ShardingError, match="down"):
        compiled(x)


@pytest.mark.parametrize("how", ["parameter", "deep", "replaced", "removed"])
def test_a_parameter_changed_after_compile_makes_the_next_call_raise(how: str):
    """Row 205."""
    model, x = Adapted(True), torch.randn(8, 16)
    compiled = shardc.compile(model, BASE_TP, mesh=Mesh(tp=2))
    compiled(x)
    if how == "parameter":
        model.register_parameter("scale", nn.Parameter(torch.ones(16)))
    elif how == "deep":
        model.base.net1.register_parameter("lora", nn.Parameter(torch.ones(16)))
    elif how == "replaced":
        model.base.net1 = nn.Linear(16, 23)
    else:
        del model.base.net1.bias
    with pytest.raises(ShardingError, match={"parameter": "scale", "deep": "lora"}.get(how, "net1")):
        compiled(x)


# --- row 206


class Outside(nn.Module):
    """Reads weights where no module's forward is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.emb, self.layer = nn.Embedding(13, 16), nn.Linear(16, 12)

    def forward(self, ids: Tensor) -> Tensor:
        if self.how == "row of an embedding":
            return self.layer(self.emb.weight[ids])
        x = self.emb(ids)
        if self.how == "scaled weight":
            return F.linear(x, self.layer.weight * 2, self.layer.bias)
        if self.how == "norm of a weight":
            return self.layer(x).square().mean() + 0.1 * self.layer.weight.norm() + self.emb.weight.square().sum()
        if self.how == "transposed weight":
            return self.layer(x) @ self.layer.weight
        return self.layer(x) + self.layer.weight.mean(1) + self.layer.weight.std()


ROW, SCALED, NORM = "row of an embedding", "scaled weight", "norm of a weight"
TRANSPOSED, STATISTICS = "transposed weight", "statistics of a weight"


@pytest.mark.parametrize(
    "w, how, style",
    [
        *((2, how, ColwiseParallel) for how in (ROW, SCALED, NORM, TRANSPOSED, STATISTICS)),
        *((2, how, RowwiseParallel) for how in (SCALED, TRANSPOSED, STATISTICS)),
        *((4, how, ColwiseParallel) for how in (ROW, NORM, STATISTICS)),
    ],
)
def test_a_weight_read_outside_its_module_is_the_whole_weight(w: int, how: str, style: type):
    """Row 206."""
    three_steps(Outside(how), {"emb": RowwiseParallel(), "layer": style()}, Mesh(tp=w), torch.randint(13, (4, 3)))


# --- row 210


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("layers.*.attn.qq", "attn.q"),
        ("layer.*.up", "layers.1.up"),
        ("layers.*.upp", "layers.1.up"),
        ("layers.up", "layers.1.up"),
        ("haed", "head"),
    ],
)
def test_a_key_that_matches_nothing_is_warned_of_with_the_nearest_name(key: str, nearest: str):
    """Row 210."""
    model = Transformer()
    with pytest.warns(UserWarning) as seen:
        shardc.compile(model, {"head": ColwiseParallel(), key: ColwiseParallel()}, mesh=Mesh(tp=2))
    (text,) = [str(w.message) for w in seen]
    assert key in text and nearest.split(".", 2)[-1] in text
    with pytest.raises(PlanError, match=key.replace("*", r"\*")) as refused:
        shardc.compile(Transformer(), {"head": ColwiseParallel(), key: ColwiseParallel()}, mesh=Mesh(tp=2), strict=True)
    assert nearest.split(".", 2)[-1] in str(refused.value)


def test_a_refused_compile_leaves_the_model_free_for_another():
    """Row 210."""
    model = MLP()
    with pytest.raises(PlanError):
        shardc.compile(model, {"net3": ColwiseParallel()}, mesh=Mesh(tp=2), strict=True)
    three_steps(model, MLP_TP, Mesh(tp=2), torch.randn(8, 16))


# --- row 212


class Attended(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "w, plan",
    [
        (2, {"attn": ColwiseParallel()}),
        (4, {"attn": ColwiseParallel()}),
        (2, {"attn.out_proj": RowwiseParallel()}),
        (2, {"attn.in_proj_weight": Shard(0)}),
        (4, {"attn.in_proj_weight": Shard(1), "out": RowwiseParallel()}),
    ],
    ids=["2, whole module", "4, whole module", "out_proj alone", "in_proj alone", "in_proj by columns"],
)
def test_multihead_attention_is_right(w: int, plan: dict[str, Any]):
    """Row 212."""
    three_steps(Attended(), plan, Mesh(tp=w), torch.randn(2, 5, 16))


def test_multihead_attention_with_its_weights_is_right():
    """Row 212."""

    class Weights(Attended):
        def forward(self, x: Tensor) -> Tensor:
            y, weights = self.attn(x, x, x)
            return self.out(y) + weights.sum()

    three_steps(Weights(kdim=16, vdim=16), {"attn": ColwiseParallel()}, Mesh(tp=2), torch.randn(2, 5, 16))


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_encoder_layer_is_right(training: bool):
    """Row 212."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)).train(training)
    plan = {"0.self_attn": ColwiseParallel(), "0.linear1": ColwiseParallel(), "0.linear2": RowwiseParallel()}
    three_steps(model, plan, Mesh(tp=2), torch.randn(2, 5, 16))


@pytest.mark.parametrize(
    "plan",
    [
        {"conv1": ColwiseParallel(), "conv2": RowwiseParallel()},
        {"conv1": ColwiseParallel(), "conv2": ColwiseParallel(), "fc": RowwiseParallel()},
        {"conv1.weight": Shard(2), "conv2.weight": Shard(1)},
    ],
    ids=["columns, rows", "columns, columns", "a kernel dim"],
)
@ways
def test_a_conv_net_is_right(w: int, plan: dict[str, Any]):
    """Row 212: as many channels as ranks, or an uneven share."""
    three_steps(ConvNet(), plan, Mesh(tp=w), torch.randn(4, 3, 5, 5))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_an_lstm_under_a_style_is_refused_by_name(style: type):
    """Row 212."""
    with pytest.raises(PlanError, match="rnn") as refused:
        shardc.compile(Recurrent(), {"rnn": style()}, mesh=Mesh(tp=2))
    assert "test_silently_wrong.py:" in str(refused.value)


def test_an_lstm_left_out_of_the_plan_or_with_placements_is_right():
    """Row 212."""
    x = torch.randn(2, 3, 8)
    three_steps(Recurrent(), {"fc": ColwiseParallel()}, Mesh(tp=2), x)
    three_steps(Recurrent(), {"rnn.weight_ih_l0": Shard(0)}, Mesh(tp=2), x)


# --- row 213


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_fewer_key_heads_than_ranks_are_right(kv_heads: int):
    """Row 213."""
    three_steps(Llama(kv_heads=kv_heads), LLAMA_TP, Mesh(tp=4), torch.randint(13, (2, 5)))


@pytest.mark.parametrize("w, fused", [(2, False), (2, True), (4, False)])
def test_heads_that_do_not_divide_by_the_ranks_are_right(w: int, fused: bool):
    """Row 213."""
    model = Transformer(dim=12, heads=3, layers=1, fused=fused, attend="sdpa")
    weights = {p.numel() for p in model.parameters()}
    program = three_steps(model, transformer_tp(fused), Mesh(tp=w), torch.randint(16, (2, 5)))
    gathers = [c for c in program.collectives() if c.kind in ("all_gather", "all_to_all")]
    assert all(c.numel in weights for c in gathers)  # stored in torch's equal pieces, computed with by whole heads


def test_a_vocabulary_that_does_not_divide_by_the_ranks_is_right():
    """Row 213."""
    plan = {"tokens": RowwiseParallel(), "head": ColwiseParallel(), **transformer_tp()}
    three_steps(Transformer(vocab=13, layers=1), plan, Mesh(tp=4), torch.randint(13, (2, 5)))


# --- several mesh dims at once


@pytest.mark.parametrize(
    "make, plan, mesh, batch",
    [
        ({"dim": 12, "heads": 3, "fused": True}, Plan(dp=Replicated(), tp=transformer_tp(True)), Mesh(dp=2, tp=2), 4),
        ({"tied": True}, Plan(a=TRANSFORMER_TP, b=TRANSFORMER_TP), Mesh(a=2, b=2), 2),
        ({"tied": True, "fused": True}, Plan(a=Replicated(), b=Replicated(), tp=transformer_tp(True)),
         Mesh(a=2, b=2, tp=2), 4),
        ({"tied": True}, TRANSFORMER_TP, Mesh(tp=3), 2),
        ({}, Plan(dp=Replicated(), tp=TRANSFORMER_TP), Mesh(dp=4, tp=2), 3),
    ],
    ids=["3 fused heads", "two dims of tensor parallelism", "three mesh dims", "4 heads on 3", "3 rows on 4 replicas"],
)  # fmt: skip
def test_a_transformer_on_an_awkward_mesh_is_right(make: dict[str, Any], plan: Any, mesh: Mesh, batch: int):
    """Rows 201, 203 and 213."""
    three_steps(Transformer(layers=1, **make), plan, mesh, torch.randint(16, (batch, 5)))  # pyright: ignore
