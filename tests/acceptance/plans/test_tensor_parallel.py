"""Tensor-parallel plans: cases 1 to 27, all ranks simulated, each beside the same model on one device."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)

import shardc
from shardc import Mesh, Plan, PlanError, Replicated
from tests.acceptance.compare import (
    ADAM,
    at_most,
    backward,
    compare,
    counts,
    forward,
    held_numel,
    moved_numel,
    output_shape,
    wire_bytes,
)
from tests.acceptance.models import (
    LLAMA_TP,
    MLP,
    MLP_TP,
    TRANSFORMER_TP,
    ConvNet,
    Deep,
    Llama,
    Nested,
    Transformer,
    transformer_tp,
)

ways = pytest.mark.parametrize("w", [2, 4])


# --- one Linear


@ways
def test_a_colwise_linear_reduces_only_the_gradient_of_its_input(w: int):
    """Case 1."""
    program = compare(nn.Linear(16, 16), ColwiseParallel(), Mesh(tp=w), torch.randn(8, 16))
    assert counts(program) == backward("all_reduce")
    assert output_shape(program) == (8, 16 // w)
    assert wire_bytes(program) == 2 * (w - 1) * 8 * 16 * 4 // w


@ways
def test_a_colwise_linear_moves_nothing_where_its_input_needs_no_gradient(w: int):
    """Case 1."""
    program = compare(nn.Linear(16, 16), ColwiseParallel(), Mesh(tp=w), torch.randn(8, 16), grads=False)
    assert counts(program) == {}


@ways
def test_a_colwise_linear_gathers_an_input_that_is_split(w: int):
    """Case 2."""
    style = ColwiseParallel(input_layouts=Shard(0))
    program = compare(nn.Linear(16, 16), style, Mesh(tp=w), torch.randn(8, 16))
    assert counts(program) == forward("all_gather") | backward("reduce_scatter")
    assert wire_bytes(program) == 2 * (w - 1) * 8 * 16 * 4 // w


@ways
@pytest.mark.parametrize("features", [16, 18, 3])
def test_a_rowwise_linear_sums_once_and_adds_its_bias_once(w: int, features: int):
    """Case 3."""
    linear = nn.Linear(features, 16)
    nn.init.constant_(linear.bias, 3.0)
    program = compare(linear, RowwiseParallel(), Mesh(tp=w), torch.randn(8, features))
    assert counts(program) == forward("all_reduce")
    assert output_shape(program) == (8, 16)


@ways
def test_a_rowwise_linear_with_a_split_output_scatters_its_sum(w: int):
    """Case 4."""
    style = RowwiseParallel(output_layouts=Shard(0))
    program = compare(nn.Linear(16, 16), style, Mesh(tp=w), torch.randn(8, 16))
    assert counts(program) == forward("reduce_scatter") | backward("all_gather")
    assert output_shape(program) == (8 // w, 16)


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_a_frozen_weight_costs_nothing_in_backward(style: type):
    """Case 15."""
    linear = nn.Linear(16, 16)
    linear.weight.requires_grad_(False)
    program = compare(linear, style(), Mesh(tp=4), torch.randn(8, 16), grads=False)
    assert [linear.weight.requires_grad, linear.bias.requires_grad] == [False, True]
    assert program.halves.backward is not None
    products = [n for n in program.halves.backward.graph.nodes if "mm" in str(n.target)]
    assert products == []
    assert not any(phase == "backward" for _, _, phase in counts(program))


# --- an MLP


@ways
@pytest.mark.parametrize("hidden", [16, 23, 3])
def test_an_mlp_takes_one_all_reduce_each_way(w: int, hidden: int):
    """Case 5."""
    program = compare(MLP(hidden=hidden), MLP_TP, Mesh(tp=w), torch.randn(8, 16))
    assert counts(program) == forward("all_reduce") | backward("all_reduce")
    assert wire_bytes(program) == 2 * 2 * (w - 1) * 8 * 16 * 4 // w


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_mlp_trains_as_on_one_device(optimizer: type):
    """Case 5."""
    model = MLP().double()
    x = torch.randn(8, 16, dtype=torch.float64)
    compare(model, MLP_TP, Mesh(tp=4), x, optimizer=lambda p: optimizer(p, lr=0.01), steps=3)


@ways
@pytest.mark.parametrize("rows", [8, 6])
def test_an_mlp_between_slices_of_the_batch_gathers_and_scatters(w: int, rows: int):
    """Case 6."""
    plan = {"net1": ColwiseParallel(input_layouts=Shard(0)), "net2": RowwiseParallel(output_layouts=Shard(0))}
    program = compare(MLP(), plan, Mesh(tp=w), torch.randn(rows, 16), grads=False)
    assert counts(program) == forward("all_gather") | forward("reduce_scatter") | backward("all_gather")
    assert output_shape(program) == (-(-rows // w), 16)


@pytest.mark.parametrize(
    "mesh", [Mesh(dp=2, tp=2), Mesh(dp=2, ep=2, tp=2), Mesh(tp=2, dp=2)], ids=["2x2", "2x2x2", "tp outer"]
)
def test_an_mlp_on_several_mesh_dims_reduces_each_gradient_once_per_data_dim(mesh: Mesh):
    """Cases 5 and 30: no activation crosses a data-parallel mesh dim."""
    data = {name: Replicated() for name in mesh.names if name != "tp"}
    program = compare(MLP(), Plan(**data, tp=MLP_TP), mesh, torch.randn(8, 16))
    found = counts(program)
    assert found.pop(("all_reduce", "tp", "forward")) == 1
    assert found.pop(("all_reduce", "tp", "backward")) == 1
    assert set(found) == {("all_reduce", name, "backward") for name in data}
    assert all(moved_numel(program, name) == held_numel(program) for name in data)


def test_a_weight_split_both_ways_is_right():
    """Case 5, on two mesh dims of tensor parallelism."""
    a = {"net1": ColwiseParallel(), "net2": RowwiseParallel()}
    b = {"net1": RowwiseParallel(), "net2": ColwiseParallel()}
    program = compare(MLP(), Plan(a=a, b=b), Mesh(a=2, b=2), torch.randn(8, 16))
    assert program.plan.params["net1.weight"].stored.text() == "[23@a, 16@b]"


def test_an_mlp_one_level_down_keeps_its_names_and_modules():
    """Case 14."""
    model = Nested()
    encoder, names = model.encoder, [n for n, _ in model.named_parameters()]
    plan = {f"encoder.{name}": style for name, style in MLP_TP.items()}
    compiled = shardc.compile(model, plan, mesh=Mesh(tp=2))
    assert compiled.encoder is encoder
    assert [n for n, _ in compiled.named_parameters()] == names
    program = compare(Nested(), plan, Mesh(tp=2), torch.randn(8, 16))
    assert counts(program) == forward("all_reduce") | backward("all_reduce")


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_only_a_forward_graph(guard: type):
    """Case 27."""
    model = MLP()
    alone, x = copy.deepcopy(model), torch.randn(8, 16)
    compiled = shardc.compile(model, MLP_TP, mesh=Mesh(tp=4))
    with guard():
        torch.testing.assert_close(compiled(x), alone(x))
    (program,) = compiled.programs
    assert program.halves.backward is None
    assert counts(program) == forward("all_reduce")
    compiled(x).sum().backward()
    alone(x).sum().backward()
    torch.testing.assert_close(model.net1.weight.grad, alone.net1.weight.grad)
    assert len(compiled.programs) == 2


# --- embeddings


@ways
def test_an_embedding_split_by_features_moves_nothing(w: int):
    """Case 7."""
    program = compare(nn.Embedding(13, 16), ColwiseParallel(), Mesh(tp=w), torch.randint(13, (4, 5)))
    assert counts(program) == {}
    assert output_shape(program) == (4, 5, 16 // w)


@pytest.mark.parametrize("vocab", [13, 16])
@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_split_by_rows_is_one_all_reduce(vocab: int, padding: int | None):
    """Case 8."""
    ids = torch.cat([torch.arange(vocab), torch.tensor([2, 0, 2, 2])[: 4 - vocab % 2]]).reshape(2, -1)
    model = nn.Embedding(vocab, 16, padding_idx=padding)
    program = compare(model, RowwiseParallel(), Mesh(tp=4), ids)
    assert counts(program) == forward("all_reduce")
    if padding is not None:
        assert model.weight[padding].count_nonzero() == 0


def test_rows_owned_by_other_ranks_add_exactly_zero():
    """Case 8: infinite rows would show through a mask that multiplies."""
    model = nn.Embedding(13, 4)
    with torch.no_grad():
        model.weight[7:] = torch.inf
    compiled = shardc.compile(model, RowwiseParallel(), mesh=Mesh(tp=4))
    ids = torch.arange(7)
    assert torch.equal(compiled(ids), model.weight[:7])


def test_an_embedding_split_by_rows_scatters_into_a_split_output():
    """Case 8."""
    style = RowwiseParallel(output_layouts=Shard(1))
    program = compare(nn.Embedding(13, 16), style, Mesh(tp=4), torch.randint(13, (2, 6)))
    assert counts(program) == forward("reduce_scatter") | backward("all_gather")


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 16)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids)))


@ways
def test_a_weight_tied_between_embedding_and_head_stays_one(w: int):
    """Case 20."""
    model, made = TiedHead(), []

    def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(ADAM(params))
        return made[-1]

    plan = {"tokens": RowwiseParallel(), "head": ColwiseParallel()}
    compare(model, plan, Mesh(tp=w), torch.randint(13, (4, 5)), optimizer=adam, steps=3)
    assert model.head.weight is model.tokens.weight
    assert [len(o.param_groups[0]["params"]) for o in made] == [1, 1]


# --- patterns, warnings, the root


def test_a_pattern_compiles_to_the_same_text_as_the_names_written_out():
    """Case 10."""
    model, x = MLP(hidden=16), torch.randn(8, 16)

    def text(*keys: str) -> str:
        plan = {key: ColwiseParallel() for key in keys}
        return str(shardc.compile(copy.deepcopy(model), plan, mesh=Mesh(tp=2)).lower(x))

    spelled = text("net1", "net2")
    assert "net1.weight" in spelled and "@tp" in spelled
    assert [text(pattern) for pattern in ("net*", "net?", "net[1-2]")] == [spelled] * 3


def test_a_pattern_over_layers_compiles_to_the_same_text_as_the_names_written_out():
    """Case 10."""
    model, x = Deep(), torch.randn(8, 16)
    short = {"layers.*.net1": ColwiseParallel(), "layers.*.net2": RowwiseParallel()}
    spelled = {f"layers.{i}.{name}": style for i in range(2) for name, style in MLP_TP.items()}
    programs = [shardc.compile(copy.deepcopy(model), p, mesh=Mesh(tp=2)).lower(x) for p in (short, spelled)]
    assert str(programs[0]) == str(programs[1])


def test_names_that_match_nothing_are_warned_of_and_the_rest_applies():
    """Case 11."""
    plan = {**MLP_TP, "net3": ColwiseParallel(), "fc.proj": RowwiseParallel()}
    with pytest.warns(UserWarning) as seen:
        program = compare(MLP(), plan, Mesh(tp=2), torch.randn(8, 16))
    texts = [str(w.message) for w in seen]
    assert len(texts) == 2
    assert "net3" in texts[0] and "fc.proj" in texts[1]
    assert counts(program) == forward("all_reduce") | backward("all_reduce")


def test_the_root_relayouts_the_whole_model_around_an_inner_plan():
    """Case 12."""
    root = PrepareModuleInputOutput(
        input_layouts=(Replicate(),),
        desired_input_layouts=(Shard(0),),
        output_layouts=(Shard(0),),
        desired_output_layouts=(Replicate(),),
    )
    inner = {"net1": ColwiseParallel(input_layouts=Shard(0)), "net2": RowwiseParallel(output_layouts=Shard(0))}
    for w in (2, 4):
        program = compare(MLP(), {"": root, **inner}, Mesh(tp=w), torch.randn(8, 16))
        assert output_shape(program) == (8, 16)


@pytest.mark.parametrize("plan", [{}, Plan()])
def test_an_empty_plan_is_warned_of_and_runs_replicated(plan: Any):
    """Case 13."""
    with pytest.warns(UserWarning, match="empty"):
        program = compare(MLP(), plan, Mesh(tp=4), torch.randn(8, 16))
    assert counts(program) == {}


# --- inputs


class Two(nn.Module):
    """Sums a Linear of each input; `shift` and `scale` are no tensors, `z` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(
        self, x: Tensor, y: Tensor, *, z: Tensor | None = None, scale: float = 1.0, shift: None = None
    ) -> Tensor:
        assert shift is None
        out = self.a(x) * scale + self.b(y)
        return out if z is None else out + z


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def forward(self, *, x: Tensor, y: Tensor, z: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.inner(x=x, y=y, z=z, scale=scale, shift=None)


COLUMNS = {"a": ColwiseParallel(), "b": ColwiseParallel()}


def test_an_input_without_a_layout_is_left_alone():
    """Case 16."""
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    program = compare(Two(), COLUMNS, Mesh(tp=4), x, y, inputs=(Shard(0), None), grads=False)
    gathers = [c for c in program.collectives() if c.kind == "all_gather" and c.phase == "forward"]
    assert [c.fqn for c in gathers][:1] == ["a"]
    text = str(program)
    assert "%x: f32[8@tp, 16] = input" in text and "%y: f32[8, 16] = input" in text


def test_a_style_leaves_alone_what_it_gives_no_layout():
    """Case 16."""
    style = PrepareModuleInput(input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None))
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    program = compare(Two(), {"": style, **COLUMNS}, Mesh(tp=4), x, y, grads=False)
    assert "%x: f32[8@tp, 16] = input" in str(program)
    assert "%y: f32[8, 16] = input" in str(program)


def test_layouts_of_another_number_than_the_inputs_are_refused_with_both_counts():
    """Case 16."""
    with pytest.raises(ValueError, match=r"3 layouts.*2 positional"):
        shardc.compile(Two(), COLUMNS, mesh=Mesh(tp=2), inputs=(Shard(0), None, None))
    style = PrepareModuleInput(input_layouts=(Shard(0),) * 3, desired_input_layouts=(Replicate(),) * 3)
    with pytest.raises(ValueError, match=r"3 layouts.*2 positional"):
        shardc.compile(Two(), {"": style, **COLUMNS}, mesh=Mesh(tp=2))


def test_a_call_with_another_number_of_inputs_than_layouts_is_refused_with_both_counts():
    """Case 16."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(16, 16)

        def forward(self, *xs: Tensor) -> Tensor:
            return self.net(sum(xs[1:], xs[0]))

    x = torch.randn(8, 16)
    compiled = shardc.compile(Many(), {"net": ColwiseParallel()}, mesh=Mesh(tp=2), inputs=(Shard(0), None))
    with pytest.raises(ValueError, match=r"2 layouts.*3 positional"):
        compiled(x, x, x)
    style = PrepareModuleInput(input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None))
    compiled = shardc.compile(Many(), {"": style, "net": ColwiseParallel()}, mesh=Mesh(tp=2))
    with pytest.raises(ValueError, match=r"3 positional arguments.*2"):
        compiled(x, x, x)


def test_keyword_inputs_are_gathered_once_each_and_numbers_pass_through():
    """Case 17."""
    style = PrepareModuleInput(
        input_kwarg_layouts={"x": Shard(0), "y": Shard(0)},
        desired_input_kwarg_layouts={"x": Replicate(), "y": Replicate()},
    )
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    plan = {"": style, "inner.a": ColwiseParallel(), "inner.b": ColwiseParallel()}
    kwargs = {"x": x, "y": y, "z": None, "scale": 2.5}
    program = compare(ByName(), plan, Mesh(tp=4), kwargs=kwargs, grads=False, outputs=Shard(-1))
    assert counts(program) == forward("all_gather", 2)


def test_keyword_layouts_of_compile_are_by_name():
    """Case 17."""
    x, y, z = torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 16)
    layouts = {"y": Shard(0), "z": Shard(1)}
    program = compare(
        Two(), COLUMNS, Mesh(tp=4), x, kwargs={"y": y, "z": z, "scale": 0.5, "shift": None},
        grads=False, inputs=layouts, outputs=Shard(-1),
    )  # fmt: skip
    assert counts(program) == forward("all_gather")


# --- norms and dropout on sequence shards


@ways
@pytest.mark.parametrize(
    "norm, affine",
    [
        (nn.LayerNorm(16), 2),
        (nn.LayerNorm(16, elementwise_affine=False), 0),
        (nn.RMSNorm(16), 1),
        (nn.RMSNorm(16, elementwise_affine=False), 0),
        (nn.Dropout(0.0), 0),
    ],
    ids=["LayerNorm", "LayerNorm, not affine", "RMSNorm", "RMSNorm, not affine", "Dropout"],
)
def test_a_norm_on_sequence_shards_only_reduces_its_affine_gradients(w: int, norm: nn.Module, affine: int):
    """Case 19."""
    model = nn.Sequential(copy.deepcopy(norm))
    x = torch.randn(2, 6, 16)
    plan = {"0": SequenceParallel()}
    program = compare(model, plan, Mesh(tp=w), x, inputs=Shard(1), outputs=Shard(1))
    assert counts(program) == (backward("all_reduce", affine) if affine else {})
    assert output_shape(program) == (2, -(-6 // w), 16)


# --- cross entropy over split classes


class Loss(nn.Module):
    def __init__(self, classes: int, weighted: bool, **options: Any) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(classes) if weighted else None)
        self.options = options

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, weight=self.weight, **self.options)


FLAT, LONG = (8, 16), (8, 16, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, reduction, weighted, ignored",
    [
        (FLAT, "none", True, 3),
        (FLAT, "mean", True, 3),
        (FLAT, "sum", True, 3),
        (FLAT, "mean", False, -100),
        (LONG, "none", False, -100),
        (LONG, "mean", False, 3),
        (LONG, "sum", False, -100),
        (LONG, "mean", True, 3),
    ],
)
def test_cross_entropy_over_split_classes_gathers_no_logits(
    shape: tuple[int, ...], reduction: str, weighted: bool, ignored: int
):
    """Case 21."""
    logits, target = torch.randn(shape), torch.randint(16, (shape[0], *shape[2:]))
    target.view(-1)[::3] = ignored
    layouts = (Shard(1), None)
    style = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
    model = Loss(16, weighted, reduction=reduction, ignore_index=ignored)
    program = compare(model, {"": style}, Mesh(tp=4), logits, target)
    found = program.collectives()
    assert len([c for c in found if c.phase == "forward"]) <= 3
    assert all(c.kind == "all_reduce" and c.numel <= target.numel() for c in found)
    assert [c for c in found if c.phase == "backward"] == []


# --- whole models


@pytest.mark.slow
@pytest.mark.parametrize("w, tied", [(4, True), (2, False)], ids=["4, tied", "2, untied"])
def test_a_transformer_moves_no_more_than_its_plan_says(w: int, tied: bool):
    """Case 23."""
    model = Transformer(tied=tied)
    program = compare(model.double(), TRANSFORMER_TP, Mesh(tp=w), torch.randint(16, (3, 8)))
    assert at_most(program, forward("all_reduce", 6) | forward("all_gather") | backward("all_reduce", 9))


@pytest.mark.slow
def test_a_transformer_under_tensor_and_data_parallelism_moves_no_activation_between_replicas():
    """Case 23 on (2, 2) and (2, 2, 2)."""
    for mesh in (Mesh(dp=2, tp=2), Mesh(pod=2, dp=2, tp=2)):
        data = {name: Replicated() for name in mesh.names if name != "tp"}
        model = Transformer(layers=1)
        program = compare(model, Plan(**data, tp=transformer_tp()), mesh, torch.randint(16, (8, 5)))
        found = counts(program)
        assert found.pop(("all_reduce", "tp", "forward")) == 2
        assert found.pop(("all_reduce", "tp", "backward")) == 2
        assert set(found) == {("all_reduce", name, "backward") for name in data}
        assert all(moved_numel(program, name) == held_numel(program) for name in data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attend, fused, view",
    [
        ("manual", False, "n_head, -1"),
        ("manual", True, "n_head, head_dim"),
        ("sdpa", False, "n_head, head_dim"),
        ("sdpa", True, "n_head, -1"),
    ],
)
def test_every_spelling_of_attention_is_two_all_reduces_each_way(attend: str, fused: bool, view: str):
    """Case 23: a block is 2 and 2."""
    model = Transformer(layers=1, attend=attend, fused=fused, view=view)
    program = compare(model, transformer_tp(fused), Mesh(tp=2), torch.randint(16, (3, 5)))
    assert counts(program) == forward("all_reduce", 2) | backward("all_reduce", 2)


@pytest.mark.slow
@ways
def test_a_llama_block_is_two_all_reduces_each_way(w: int):
    """Case 23, with rotary positions, gated SiLU and as many key heads as ranks or fewer."""
    program = compare(Llama(), LLAMA_TP, Mesh(tp=w), torch.randint(13, (3, 5)))
    found = counts(program)
    if w == 2:
        assert found == forward("all_reduce", 2) | backward("all_reduce", 2)


@pytest.mark.slow
def test_a_conv_net_with_batch_norm_is_right_under_a_plan_by_channels():
    """Case 23, for convolutions."""
    plan = {"conv1": ColwiseParallel(), "conv2": RowwiseParallel()}
    compare(ConvNet(), plan, Mesh(tp=2), torch.randn(4, 3, 6, 6), grads=False)


def test_a_style_of_a_module_that_cannot_take_it_is_refused_by_name():
    """Cases 13 and 14: an error, not a silent skip."""
    with pytest.raises(PlanError, match="encoder"):
        shardc.compile(Nested(), {"encoder": ColwiseParallel()}, mesh=Mesh(tp=2))


FUSED = {
    "unpacked": lambda y, b, t, h: y.view(b, t, 3, h, -1).permute(2, 0, 3, 1, 4),
    "selected": lambda y, b, t, h: (y.view(b, t, 3, h, -1).transpose(1, 3)[:, :, i] for i in range(3)),
    "unbound": lambda y, b, t, h: y.view(b, t, 3, h, -1).transpose(1, 3).unbind(2),
    "in chunks": lambda y, b, t, h: (x.view(b, t, h, -1).transpose(1, 2) for x in y.chunk(3, -1)),
    "split": lambda y, b, t, h: (x.view(b, t, h, -1).transpose(1, 2) for x in y.split(y.shape[-1] // 3, -1)),
}


class FusedAttention(nn.Module):
    def __init__(self, taken_apart: str) -> None:
        super().__init__()
        self.taken_apart = FUSED[taken_apart]
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.taken_apart(self.qkv(x), b, t, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("taken_apart", FUSED)
def test_heads_stay_split_where_no_gradient_flows_into_fused_projections(taken_apart: str, learns: bool):
    """The first block, whose input needs no gradient, and every block in inference."""
    model, x = nn.Sequential(FusedAttention(taken_apart), FusedAttention(taken_apart)), torch.randn(2, 5, 16)
    model.requires_grad_(learns)
    want = copy.deepcopy(model)(x)
    compiled = shardc.compile(model, {"*.qkv": ColwiseParallel(), "*.proj": RowwiseParallel()}, mesh=Mesh(tp=2))
    torch.testing.assert_close(compiled(x), want)
    kinds = Counter((c.kind, c.phase) for c in compiled.programs[-1].collectives())
    assert kinds == Counter({("all_reduce", "forward"): 2, **({("all_reduce", "backward"): 1} if learns else {})})
