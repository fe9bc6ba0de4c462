"""Traced graphs of many kinds of modules compute what the modules compute: outputs, mutations, gradients."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardc.compiler.ir.signature import InputKind, OutputKind
from tests.trace.eager import check


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.out(self.mlp(self.ln2(x)))


class GPT(nn.Module):
    """Tied embeddings, fused q, k, v, positions from arange, a loss when targets are given."""

    def __init__(self, vocabulary=17, width=12, heads=3, layers=2):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(8, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids, targets=None):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(F.max_pool2d(F.relu(self.bn(self.conv(x)), inplace=True), 2).mean((2, 3)))


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(6, 6), nn.Dropout(0.1)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.fc(self.drop(x)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        y, (h, _) = self.lstm(x)
        return self.fc(y), h


class Flexible(nn.Module):
    """Keyword-only, default, None, number, *args and **kwargs arguments."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, *more, scale, mask=None, shift=0.5, mode="relu", **extra):
        y = self.fc(x) * scale + shift
        for m in more:
            y = y + m
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        y = torch.relu(y) if mode == "relu" else y
        return y + extra["bias"] if "bias" in extra else y


class Pair(NamedTuple):
    hidden: Tensor
    rows: int


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch):
        y = self.fc(batch["x"]) + batch["more"][0]
        return {"pair": Pair(y, 3), "list": [y.sum(), None, 2.5], "top": y.argmax(-1), "both": (y, y)}


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.inner, self.outer, self.reentrant = MLP(), nn.Linear(6, 6), reentrant

    def forward(self, x):
        return self.outer(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class Aliasing(nn.Module):
    """Returns its input, a parameter, a buffer, views of them and views of each other."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("b", torch.randn(4))

    def forward(self, x):
        y = x @ self.w
        return x, self.w, self.b, x.t(), y, y.view(-1), y[0], self.w.diagonal(), x


class Partial(nn.Module):
    """Frozen, unused, tied, scalar and used parameters; an output without a gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.offset = torch.linspace(0, 1, 4)

    def forward(self, x):
        y = self.b(self.a(x)) * self.scale + self.table + self.offset + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return y, (y > 0), y.detach()


class Mutating(nn.Module):
    """Buffers changed in place and by assignment, an input changed in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("still", torch.ones(4))

    def forward(self, x, cache):
        y = self.fc(x) * self.still
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        cache[1:3].mul_(2).add_(y.detach()[1:3])
        return y + self.mean + cache


class CustomFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        (x,) = ctx.saved_tensors
        return grad * (x > 0) * 2


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return CustomFunction.apply(self.fc(x))


class ScriptedChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(6)))

    def forward(self, x):
        return self.block(self.fc(x)).sum(-1)


def _plus_one(module: nn.Module, args: Any, output: Any) -> Tensor:
    return output + 1


class Hooked(nn.Module):
    """The user's own hooks change what goes in and out."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.fc.register_forward_hook(_plus_one)

    def forward(self, x):
        return self.fc(x)


class MeanOf(nn.Module):
    def forward(self, *xs):
        return sum(xs) / math.sqrt(len(xs))


def test_mlp():
    check(MLP(), torch.randn(3, 6))


def test_input_that_requires_grad_has_a_gradient():
    traced = check(MLP(), torch.randn(3, 6, requires_grad=True))
    gradients = [o for o in traced.signature.outputs if o.kind is OutputKind.GRADIENT]
    assert [o.name for o in gradients][-1] == "x"


@pytest.mark.parametrize("marks", [(), ("", "layers.0", "layers.0.attn", "layers.1", "tok", "head", "norm")])
def test_gpt_with_tied_embeddings(marks):
    traced = check(GPT(), torch.randint(17, (2, 5)), marks=marks)
    assert dict(traced.signature.tied) == {"head.weight": "tok.weight"}
    names = [i.name for i in traced.signature.inputs]
    assert "tok.weight" in names and "head.weight" not in names


def test_loss_inside_forward():
    ids = torch.randint(17, (2, 5))
    traced = check(GPT(), ids, kwargs={"targets": ids.roll(1)})
    assert [i.name for i in traced.signature.inputs if i.kind is InputKind.TANGENT] == ["output"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_convolution_and_batch_norm(mode):
    traced = check(getattr(ConvNet(), mode)(), torch.randn(4, 3, 8, 8, requires_grad=True))
    changed = [o.name for o in traced.signature.outputs if o.kind is OutputKind.MUTATION]
    training = ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert changed == (training if mode == "train" else [])


def test_channels_last_input():
    check(ConvNet(), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_())


def test_input_that_is_a_slice_or_expanded():
    for x in (torch.randn(3, 12)[:, ::2], torch.randn(1, 6).expand(3, 6)):
        traced = check(MLP(), x)
        assert next(n for n in traced.gm.graph.nodes if n.name == "x").meta["val"].is_contiguous()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_draws_what_eager_draws(mode):
    check(getattr(Dropout(), mode)(), torch.randn(5, 6))


def test_lstm():
    check(Recurrent(), torch.randn(2, 3, 4, requires_grad=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "kind, options", [(nn.GRU, {}), (nn.RNN, {}), (nn.LSTM, {"bidirectional": True}), (nn.LSTM, {"proj_size": 2})]
)
@pytest.mark.parametrize("grad", [True, False])
def test_other_recurrent_modules(kind, options, grad):
    check(kind(4, 5, **options).train(grad), torch.randn(3, 2, 4), grad=grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(grad, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    check(layer.train(grad), torch.randn(2, 5, 8), grad=grad)


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(weights):
    x = torch.randn(2, 5, 8)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    check(nn.MultiheadAttention(8, 2, batch_first=True), x, x, x, kwargs={"attn_mask": mask, "need_weights": weights})


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((), {"scale": 2}),
        ((), {"scale": 2.5, "mode": "none", "mask": None}),
        ((torch.ones(3, 4), torch.ones(4)), {"scale": torch.tensor(3.0), "shift": 1}),
        ((), {"scale": 2, "mask": torch.eye(3, 4).bool(), "bias": torch.ones(4)}),
    ],
)
def test_arguments_of_every_kind(args, kwargs):
    check(Flexible(), torch.randn(3, 4), *args, kwargs=kwargs)


def test_variadic_arguments():
    traced = check(MeanOf(), torch.ones(2), torch.ones(2), torch.randn(2, requires_grad=True))
    assert [i.name for i in traced.signature.inputs if i.kind is InputKind.BATCH] == ["xs[0]", "xs[1]", "xs[2]"]


def test_nested_inputs_and_outputs():
    traced = check(Structured(), {"x": torch.randn(3, 4), "more": [torch.randn(4, requires_grad=True)]})
    assert [leaf.name for leaf in traced.signature.leaves] == ["batch['x']", "batch['more'][0]"]
    names = [o.name for o in traced.signature.outputs if o.kind is OutputKind.OUTPUT]
    assert names[:2] == ["output['pair'].hidden", "output['pair'].rows"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_child(reentrant):
    traced = check(Checkpointed(reentrant), torch.randn(3, 6, requires_grad=True))
    again = {n.meta["path"] for n in traced.gm.graph.nodes if n.meta.get("region")}
    assert again == {"inner", "inner.up", "inner.down"}


def test_outputs_that_alias_inputs_parameters_and_each_other():
    check(Aliasing(), torch.randn(4, 4, requires_grad=True))


def test_identity():
    traced = check(nn.Identity(), torch.randn(3, requires_grad=True))
    assert not [n for n in traced.gm.graph.nodes if n.op == "call_function"]


def test_frozen_unused_tied_and_scalar_parameters():
    traced = check(Partial(), torch.randn(3, 4))
    gradients = {o.name: o.node for o in traced.signature.outputs if o.kind is OutputKind.GRADIENT}
    assert set(gradients) == {"a.weight", "b.bias", "scale", "unused.weight", "unused.bias"}
    assert [name for name, node in gradients.items() if node is None] == ["unused.weight", "unused.bias"]
    constants: dict[str, Any] = {i.name: i.value for i in traced.signature.inputs if i.kind is InputKind.CONSTANT}
    assert list(constants) == ["offset", "constant1"]
    assert torch.equal(constants["constant1"], torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_everything_frozen_gives_a_forward_only():
    traced = check(MLP().requires_grad_(False), torch.randn(3, 6))
    assert {o.kind for o in traced.signature.outputs} == {OutputKind.OUTPUT}


def test_no_grad_gives_a_forward_only():
    traced = check(GPT(), torch.randint(17, (2, 5)), grad=False)
    assert {o.kind for o in traced.signature.outputs} == {OutputKind.OUTPUT}
    assert {n.meta["phase"] for n in traced.gm.graph.nodes if n.op != "output"} == {"forward"}


def test_mutations():
    traced = check(Mutating(), torch.randn(4, 4), torch.randn(4, 4))
    assert [o.name for o in traced.signature.outputs if o.kind is OutputKind.MUTATION] == ["steps", "mean", "cache"]


def test_buffer_that_requires_grad():
    class Scaled(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("extra", nn.Parameter(torch.randn(6)).detach().requires_grad_())
            self.register_buffer("plain", torch.randn(6))

        def forward(self, x):
            return super().forward(x) * self.extra + self.plain

    check(Scaled(), torch.randn(3, 6))


def test_custom_autograd_function():
    check(WithFunction(), torch.randn(3, 4, requires_grad=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scripted_child(mode):
    check(getattr(ScriptedChild(), mode)(), torch.randn(3, 6, requires_grad=True))


class Blocks(nn.Module):
    """Traced by dispatch: a scripted block between lines of Python, a constant used twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.block, self.offset = nn.Linear(6, 6), torch.jit.script(nn.Tanh()), torch.linspace(0, 1, 6)

    def forward(self, x):
        y = self.fc(x) + self.offset  # before
        y = self.block(y)  # scripted
        return F.gelu(y * self.offset)  # after


def test_tracing_by_dispatch_knows_lines_and_modules_too():
    traced = check(Blocks(), torch.randn(3, 6), marks=[""])
    lines = Path(__file__).read_text().splitlines()
    at = {c: i for i, line in enumerate(lines, 1) for c in ("before", "scripted", "after") if line.endswith(f"# {c}")}
    calls = [n for n in traced.gm.graph.nodes if n.op == "call_function"]
    places = {(n.meta["phase"], str(n.target), n.meta["path"], n.meta["line"]) for n in calls}
    assert {
        ("forward", "aten.addmm.default", "fc", at["before"]),
        ("forward", "aten.tanh.default", "block", at["scripted"]),
        ("forward", "aten.gelu.default", "", at["after"]),
        ("backward", "aten.gelu_backward.default", "", at["after"]),
        ("backward", "aten.tanh_backward.default", "block", at["scripted"]),
        ("backward", "aten.mm.default", "fc", at["before"]),
    } <= places
    assert {Path(n.meta["file"]).name for n in calls} == {Path(__file__).name}
    assert [i.name for i in traced.signature.inputs if i.kind is InputKind.CONSTANT] == ["offset"]


def test_traced_child_and_scripted_root():
    traced: Any = torch.jit.trace(nn.Linear(6, 6), torch.randn(3, 6))
    check(nn.Sequential(traced, nn.Tanh()), torch.randn(3, 6))
    check(torch.jit.script(nn.Linear(6, 6)), torch.randn(3, 6))


def test_own_hooks_still_run():
    check(Hooked(), torch.randn(3, 4), marks=["fc"])


@pytest.mark.parametrize("modifier", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrized_weight(modifier):
    check(modifier(nn.Linear(4, 4)), torch.randn(3, 4))


def test_autocast_is_in_force():
    with torch.autocast("cpu", torch.bfloat16):
        traced = check(MLP(), torch.randn(3, 6))
    assert any(n.meta["val"].dtype is torch.bfloat16 for n in traced.gm.graph.nodes if n.op == "call_function")


def test_complex_and_fourier():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.w, n=8)

    check(Spectrum(), torch.randn(3, 8))
