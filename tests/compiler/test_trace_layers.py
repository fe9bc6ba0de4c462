"""Repeated layers are traced once: the graph is the one that tracing each of them gives, or they are left alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardc.compiler import trace_layers
from shardc.compiler.errors import ShardingError
from shardc.compiler.marks import constrain
from shardc.compiler.trace import Traced, trace
from tests.compiler.eager import check

N = 5  # layers of a model: worth it for those of eight operators and more


def lines(traced: Traced) -> list[str]:
    """All there is to a graph: operators, operands, what they make, and where they come from."""
    regions: dict[str, str] = {}

    def line(node: Any) -> str:
        meta = {key: value for key, value in node.meta.items() if key != "val"}
        if region := meta.get("recompute"):  # numbered as met, in this process
            meta["recompute"] = regions.setdefault(region, f"region {len(regions)}")
        made = [
            (tuple(t.shape), t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t
            for t in pytree.tree_leaves(node.meta.get("val"))
        ]
        return f"{node.name} = {node.target}({node.args}, {node.kwargs}) {made} {meta}"

    return [line(node) for node in traced.gm.graph.nodes]


class Traces:
    """What was traced: `whole` programs, and layers by themselves."""

    def __init__(self) -> None:
        self.whole = self.layers = 0

    def export(self, export: Callable[..., Any], run: Any, *args: Any) -> Any:
        if isinstance(run, partial):
            self.layers += 1
        else:
            self.whole += 1
        return export(run, *args)


def both(monkeypatch: pytest.MonkeyPatch, module: nn.Module, *args: Any, **options: Any) -> tuple[Traced, Traces]:
    """Traces by layers and in the ordinary way, and holds one against the other."""
    traces = Traces()
    with monkeypatch.context() as patched:
        patched.setattr(trace_layers, "export", partial(traces.export, trace_layers.export))
        found = trace(module, args, **options)
    with monkeypatch.context() as patched:
        patched.setattr(trace_layers, "repeats", lambda graph: [])
        ordinary = trace(module, args, **options)
    for a, b in zip(lines(found), lines(ordinary), strict=True):
        assert a == b
    assert found.signature.inputs == ordinary.signature.inputs or any(i.value is not None for i in found.signature.inputs)
    assert found.signature.outputs == ordinary.signature.outputs
    return found, traces


def reused(traces: Traces, layers: int) -> bool:
    return traces.whole == 1 and traces.layers == layers


class Block(nn.Module):
    """Attention and an MLP, with what a test wants of them besides."""

    def __init__(self, d: int = 8, drop: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.drop, self.scale = nn.Dropout(drop), scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x))) * self.scale


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, d: int = 8):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(4, d), nn.ModuleList(blocks), nn.Linear(d, 4)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *rest)
        return self.last(x)


def blocks(**options: Any) -> list[Block]:
    return [Block(**options) for _ in range(N)]


def batch() -> Tensor:
    return torch.randn(2, 3, 4)


def test_a_layer_is_traced_once(monkeypatch):
    assert reused(both(monkeypatch, Stack(*blocks()), batch())[1], layers=1)


def test_few_or_small_layers_are_left_alone(monkeypatch):
    assert reused(both(monkeypatch, Stack(Block(), Block()), batch())[1], layers=0)
    assert reused(both(monkeypatch, Stack(*(nn.Linear(8, 8) for _ in range(N))), batch())[1], layers=0)


def test_values_and_gradients_are_those_of_eager():
    check(Stack(*blocks()), batch())


def test_marks_have_the_keys_of_their_own_layer(monkeypatch):
    names = ("up", "down", "qkv")
    marks = ["blocks", *(f"blocks.{i}{name}" for i in range(N) for name in ("", *(f".{n}" for n in names)))]
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), marks=marks[1:])[1], layers=1)


def test_layers_with_other_marks_are_other_layers(monkeypatch):
    marks = [f"blocks.{i}.up" for i in range(N - 1)]
    assert reused(both(monkeypatch, Stack(*blocks(), *blocks()), batch(), marks=marks)[1], layers=2)


class Constrained(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        from torch.distributed.tensor import Shard

        return constrain(super().forward(x, mask), Shard(0))


def test_constraints_inside(monkeypatch):
    assert reused(both(monkeypatch, Stack(*(Constrained() for _ in range(N))), batch())[1], layers=1)


def test_dropout_draws_in_the_same_order(monkeypatch):
    model = Stack(*blocks(drop=0.5))
    assert reused(both(monkeypatch, model, batch())[1], layers=1)
    check(model, batch())


def test_frozen_layers_are_other_layers(monkeypatch):
    model = Stack(*blocks(), *blocks(), *blocks())
    for block in model.blocks[N : 2 * N]:
        block.requires_grad_(False)
    assert reused(both(monkeypatch, model, batch())[1], layers=2)


def test_a_wholly_frozen_model_and_one_without_gradients(monkeypatch):
    model = Stack(*blocks())
    assert reused(both(monkeypatch, model, batch(), grad=False)[1], layers=1)
    assert reused(both(monkeypatch, model.requires_grad_(False), batch())[1], layers=1)


def test_frozen_layers_before_the_first_that_is_not(monkeypatch):
    model = Stack(*blocks(), *blocks())
    model.first.requires_grad_(False)
    model.blocks[:N].requires_grad_(False)
    assert reused(both(monkeypatch, model, batch())[1], layers=3)  # the first trained one has no gradient to hand on


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_weights_tied_across_layers(monkeypatch, drop):
    model = Stack(*blocks(drop=drop))
    for block in model.blocks[1:]:
        block.up.weight, block.norm = model.blocks[0].up.weight, model.blocks[0].norm
    model.last.weight = nn.Parameter(model.blocks[0].out.weight[:4].detach().clone())
    # The last has no gradient of these weights to add to; the first hands theirs on to nobody.
    assert reused(both(monkeypatch, model, batch())[1], layers=3)
    check(model.eval(), batch())


def test_one_layer_called_again_and_again(monkeypatch):
    block = Block()
    assert reused(both(monkeypatch, Stack(*[block] * N), batch())[1], layers=3)


class Conditioned(Block):
    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return super().forward(x * self.up(given).chunk(2, -1)[0] + given.softmax(-1) * given)


class Conditions(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        given, skipped = x.tanh(), []
        for block in self.blocks:
            x = block(x, given)
            skipped.append(x)
        for block in self.blocks:
            x = block(x, given) + skipped.pop()
        return self.last(x * given)


def test_sums_of_gradients_keep_their_order(monkeypatch):
    """What each layer uses several times, and what is used again much later."""
    model = Conditions(*(Conditioned() for _ in range(N)))
    assert reused(both(monkeypatch, model, batch())[1], layers=3)
    check(model, batch())


def test_layers_of_other_shape_are_other_layers(monkeypatch):
    class Narrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.ModuleList(blocks()), nn.ModuleList(blocks(d=4))
            self.to = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.wide:
                x = block(x)
            x = self.to(x)
            for block in self.narrow:
                x = block(x)
            return x

    assert reused(both(monkeypatch, Narrowing(), torch.randn(2, 3, 8))[1], layers=2)


def test_a_number_that_differs_makes_another_layer(monkeypatch):
    model = Stack(*blocks(), *blocks(scale=-0.0), *(Block(scale=2.0 + i) for i in range(3)))
    assert reused(both(monkeypatch, model, batch())[1], layers=2)


def test_a_shared_mask_and_table(monkeypatch):
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), mask)[1], layers=1)
    shift = torch.randn(3, 3, requires_grad=True)
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), shift)[1], layers=3)


class Several(Block):
    def forward(self, x: Tensor, extra: Any = None) -> Any:
        y = super().forward(x)
        return y, {"norm": self.norm(y), "count": torch.tensor([1.0, 2.0]).sum() + y.detach().sum()}


class Keeping(Stack):
    def forward(self, x: Tensor) -> Any:
        x, kept = self.first(x), []
        for block in self.blocks:
            x, more = block(x)
            kept.append(more)
        return self.last(x), kept[1]["norm"].transpose(0, 1), kept[-1], kept[0]["count"]


def test_layers_with_several_results_and_constants_of_their_own(monkeypatch):
    model = Keeping(*(Several() for _ in range(2 * N)))
    found, traces = both(monkeypatch, model, batch())
    assert traces.layers > 0 and len([i for i in found.signature.inputs if i.value is not None]) == 3
    check(model, batch())


class Strided(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (super().forward(x) + 1).transpose(0, 1).sin().transpose(0, 1)


def test_results_that_lie_otherwise_in_memory(monkeypatch):
    model = Stack(*(Strided() for _ in range(N)))
    assert both(monkeypatch, model, batch())[1].layers in (1, 2)
    check(model, batch())


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.statistics = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(self.statistics(x))


class Writing(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x.detach())
        x.mul_(2)
        return y + x


class WritingAfter(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            x += 1
        return self.last(x)


class Viewing(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y, y[0]


class Views(Stack):
    def forward(self, x: Tensor) -> Any:
        x, kept = self.first(x), x
        for block in self.blocks:
            x, kept = block(x)
            x = x + kept
        return self.last(x)


class Switching(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        torch._C._set_grad_enabled(not torch.is_grad_enabled())
        return y


LEFT_ALONE = {
    "batch norm writes its statistics": Stack(*(Normed() for _ in range(N))),
    "an input is written to": Stack(*(Writing() for _ in range(N))),
    "a result is written to later": WritingAfter(*blocks()),
    "one result is a view of another": Views(*(Viewing() for _ in range(N))),
    "gradients are switched off": Stack(*(Switching() for _ in range(N + 1))),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(monkeypatch, case):
    _, traces = both(monkeypatch, LEFT_ALONE[case], batch())
    assert traces.whole == 2
    assert torch.is_grad_enabled()


class InPlace(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y += x
        return F.relu_(y * 2)


def test_what_a_layer_writes_to_of_its_own_is_its_business(monkeypatch):
    model = Stack(*(InPlace() for _ in range(N)))
    assert reused(both(monkeypatch, model, batch())[1], layers=1)
    check(model, batch())


class Mixed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = super().forward(x)
        return super().forward(x)


def test_autocast_around_layers(monkeypatch):
    model = Mixed(*blocks())
    assert reused(both(monkeypatch, model, batch())[1], layers=5)


class Careful(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = self.up(x).float()
        return super().forward(x) + y.chunk(2, -1)[0]


def test_autocast_and_no_grad_inside(monkeypatch):
    assert reused(both(monkeypatch, Stack(*(Careful() for _ in range(N))), batch())[1], layers=1)


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


def test_checkpointed_layers_are_regions_of_their_own(monkeypatch):
    marks = [f"blocks.{i}.up" for i in range(N)]
    found, traces = both(monkeypatch, Checkpointed(*blocks(drop=0.5)), batch(), marks=marks)
    assert reused(traces, layers=1)
    assert len({n.meta["recompute"] for n in found.gm.graph.nodes if n.meta.get("recompute")}) == N


def test_layers_within_stages(monkeypatch):
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.end = nn.ModuleList(blocks()), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.end(x)

    assert reused(both(monkeypatch, Stack(Stage(), Stage()), batch())[1], layers=1)


def test_torch_layers_have_the_line_that_calls_them(monkeypatch):
    """All their own lines are torch's, so that what remains differs from call to call."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e, self.f = (
                nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(6)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = self.b(x)
            x = self.c(x)
            x = self.d(x)
            x = self.e(x)
            return self.f(x)

    assert reused(both(monkeypatch, Written(), torch.randn(2, 3, 8))[1], layers=1)


def test_symbolic_sizes_are_left_alone(monkeypatch):
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), symbolic=True)[1], layers=0)


class Asking(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y[y.sum().nonzero()] if self.scale == 2 else y


def test_an_error_inside_a_layer_is_the_same(monkeypatch):
    errors = []
    for find in (trace_layers.repeats, lambda graph: []):
        monkeypatch.setattr(trace_layers, "repeats", find)
        with pytest.raises(ShardingError) as caught:
            trace(Stack(*(Asking(scale=2.0) for _ in range(N))), (batch(),))
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "test_trace_layers.py:" in errors[0]
