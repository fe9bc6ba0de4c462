"""Repeated layers are traced once: the graph is the one that tracing each of them gives, or they are left alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.marks import constrain
from shardc.compiler.ir.signature import Traced
from shardc.compiler.trace.layers import copy_layers as trace_layers
from shardc.compiler.trace.layers import repeats as trace_repeats
from shardc.compiler.trace.trace import trace
from tests.trace.eager import compare

N = 3  # layers of a model


@pytest.fixture(autouse=True)
def small_layers_are_worth_it(monkeypatch):
    monkeypatch.setattr(trace_repeats, "TRACES", 1.5)
    monkeypatch.setattr(trace_repeats, "CALL", 0)


def lines(traced: Traced) -> list[str]:
    """All there is to a graph: operators, operands, what they make, and where they come from."""
    regions: dict[str, str] = {}

    def line(node: Any) -> str:
        meta = {key: value for key, value in node.meta.items() if key != "val"}
        if region := meta.get("region"):  # numbered as met, in this process
            meta["region"] = regions.setdefault(region, f"region {len(regions)}")
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


def dataflow(traced: Traced) -> list[Any]:
    """What each operator is and is given, whatever their order."""
    number: dict[Any, int] = {}
    forms: dict[Any, int] = {}
    for i, node in enumerate(traced.gm.graph.nodes):
        args = pytree.tree_map_only(Node, number.__getitem__, (node.args, node.kwargs))
        form = (node.op, str(node.target), repr(args), node.meta.get("path"), node.meta.get("line"))
        number[node] = hash((form, i)) if node.op == "placeholder" else hash(form)
        forms[form] = forms.get(form, 0) + 1
    return sorted(forms.items())


def both(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, *args: Any, read: Callable[..., Any] = lines, **options: Any
) -> tuple[Traced, Traces]:
    """Traces by layers and in the ordinary way, and holds one against the other."""
    traces = Traces()
    with monkeypatch.context() as patched:
        patched.setattr(trace_layers, "joint_graph", partial(traces.export, trace_layers.joint_graph))
        found = trace(module, args, **options)
    with monkeypatch.context() as patched:
        patched.setattr(trace_layers, "repeats", lambda graph: [])
        ordinary = trace(module, args, **options)
    for a, b in zip(read(found), read(ordinary), strict=True):
        assert a == b
    inputs = [[replace(i, value=None) for i in traced.signature.inputs] for traced in (found, ordinary)]
    values = [[i.value for i in traced.signature.inputs] for traced in (found, ordinary)]
    assert inputs[0] == inputs[1]
    torch.testing.assert_close(*([v for v in held if v is not None] for held in values))
    unnamed = [[replace(o, node=None) for o in traced.signature.outputs] for traced in (found, ordinary)]
    assert unnamed[0] == unnamed[1]
    assert read is dataflow or found.signature.outputs == ordinary.signature.outputs
    return found, traces


def reused(traces: Traces, layers: int) -> bool:
    return traces.whole == 1 and traces.layers == layers


class Block(nn.Module):
    """As small as a layer may be: attention of one head, and an MLP of one weight."""

    def __init__(self, d: int = 4, drop: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.norm, self.up, self.drop, self.scale = nn.LayerNorm(d), nn.Linear(d, d), nn.Dropout(drop), scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if mask is not None:
            y = F.scaled_dot_product_attention(y, y, y, attn_mask=mask)
        return x + self.drop(F.gelu(self.up(y))) * self.scale


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(4, 4), nn.ModuleList(blocks), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *rest)
        return self.last(x)


def blocks(**options: Any) -> list[Block]:
    return [Block(**options) for _ in range(N)]


def batch() -> Tensor:
    return torch.randn(2, 3, 4)


def test_a_layer_is_traced_once_and_computes_what_eager_does(monkeypatch):
    model = Stack(*blocks())
    found, traces = both(monkeypatch, model, batch())
    assert reused(traces, layers=1)
    compare(found, model, ((batch(),), {}))


def test_few_or_small_layers_are_left_alone(monkeypatch):
    monkeypatch.undo()
    assert reused(both(monkeypatch, Stack(*blocks()), batch())[1], layers=0)
    assert reused(both(monkeypatch, Stack(*(nn.Linear(4, 4) for _ in range(9))), batch())[1], layers=0)


def test_marks_have_the_keys_of_their_own_layer(monkeypatch):
    marks = [f"blocks.{i}{name}" for i in range(N) for name in ("", ".up", ".norm")]
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), marks=marks)[1], layers=1)


def test_layers_with_other_marks_are_other_layers(monkeypatch):
    marks = [f"blocks.{i}.up" for i in (0, 2)]
    assert reused(both(monkeypatch, Stack(*blocks(), Block()), batch(), marks=marks)[1], layers=2)


class Constrained(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return constrain(super().forward(x, mask), Shard(0))


def test_constraints_inside(monkeypatch):
    assert reused(both(monkeypatch, Stack(*(Constrained() for _ in range(N))), batch())[1], layers=1)


def test_dropout_draws_in_the_same_order(monkeypatch):
    model = Stack(*blocks(drop=0.5))
    found, traces = both(monkeypatch, model, batch())
    assert reused(traces, layers=1)
    compare(found, model, ((batch(),), {}))


def test_frozen_layers_are_other_layers(monkeypatch):
    model = Stack(*(Block() for _ in range(6)))
    model.blocks[2:4].requires_grad_(False)
    assert reused(both(monkeypatch, model, batch())[1], layers=2)


def test_a_wholly_frozen_model_and_one_without_gradients(monkeypatch):
    model = Stack(*blocks())
    assert reused(both(monkeypatch, model, batch(), grad=False)[1], layers=1)
    assert reused(both(monkeypatch, model.requires_grad_(False), batch())[1], layers=1)


def test_frozen_layers_before_the_first_that_is_not(monkeypatch):
    model = Stack(*(Block() for _ in range(5)))
    model.first.requires_grad_(False)
    model.blocks[:2].requires_grad_(False)
    assert reused(both(monkeypatch, model, batch())[1], layers=2)


def test_weights_tied_across_layers(monkeypatch):
    model = Stack(*blocks(drop=0.5))
    first, *others = (block for block in model.blocks if isinstance(block, Block))
    for block in others:
        block.up.weight, block.norm = first.up.weight, first.norm
    model.last.weight = first.up.weight
    found, traces = both(monkeypatch, model, batch())
    assert reused(traces, layers=1)
    compare(found, model, ((batch(),), {}))


def test_one_layer_called_again_and_again(monkeypatch):
    assert reused(both(monkeypatch, Stack(*[Block()] * N), batch())[1], layers=1)


class Conditioned(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(x * self.up(mask) + mask.softmax(-1) * mask)


class Conditions(Stack):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
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
    model = Conditions(*(Conditioned() for _ in range(3)))
    found, traces = both(monkeypatch, model, batch())
    assert reused(traces, layers=2)
    compare(found, model, ((batch(),), {}))


def test_layers_of_other_shape_are_other_layers(monkeypatch):
    class Narrowing(Stack):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            x = super().forward(x)
            for block in self.blocks:
                x = block(x[:, 1:])
            return x

    assert reused(both(monkeypatch, Narrowing(Block(), Block()), torch.randn(2, 5, 4))[1], layers=1)


def test_a_number_that_differs_makes_another_layer(monkeypatch):
    model = Stack(*(Block(scale=scale) for scale in (0.0, -0.0, 0.0, -0.0, 2.0)))
    assert reused(both(monkeypatch, model, batch())[1], layers=2)


def test_a_shared_mask_and_table(monkeypatch):
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), mask)[1], layers=1)
    shift = torch.randn(3, 3, requires_grad=True)
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), shift)[1], layers=1)


class Several(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y, {"norm": self.norm(y), "count": torch.tensor([1.0, 2.0]).sum() + y.detach().sum()}


class Keeping(Stack):
    def forward(self, x: Tensor, *rest: Any) -> Any:
        x, kept = self.first(x), []
        for block in self.blocks:
            x, more = block(x)
            kept.append(more)
        return self.last(x), kept[1]["norm"].transpose(0, 1), kept[-1], kept[0]["count"]


def test_layers_with_several_results_and_constants_of_their_own(monkeypatch):
    model = Keeping(*(Several() for _ in range(2 * N)))
    found, traces = both(monkeypatch, model, batch())
    assert traces.layers > 0 and len([i for i in found.signature.inputs if i.value is not None]) == 2
    compare(found, model, ((batch(),), {}))


class Strided(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (super().forward(x) + 1).transpose(0, 1).sin().transpose(0, 1)


def test_results_that_lie_otherwise_in_memory(monkeypatch):
    model = Stack(*(Strided() for _ in range(N)))
    found, traces = both(monkeypatch, model, batch())
    assert traces.layers in (1, 2)
    compare(found, model, ((batch(),), {}))


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.statistics = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(self.statistics(x))


class Writing(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x.detach().clone())
        x.mul_(2)
        return y + x


class WritingAfter(Stack):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
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
    def forward(self, x: Tensor, *rest: Any) -> Any:
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
    assert traces.whole > 1 and not traces.layers
    assert torch.is_grad_enabled()


class Detaching(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x.detach_()
        return super().forward(x, mask)


class Around(Stack):
    """Each block has a way around it, and where `hooked` something looks at the gradient of both together."""

    hooked = False

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.first(x).sigmoid()
        for block in self.blocks:
            y = block(x)
            if self.hooked:
                x.register_hook(torch.square)
            x = x + y
        return self.last(x)


class Hooked(Around):
    hooked = True


SEEN_BY_AUTOGRAD = {"detach": Around(*(Detaching() for _ in range(N))), "hook": Hooked(*blocks())}


@pytest.mark.parametrize("case", SEEN_BY_AUTOGRAD)
def test_left_alone_where_gradients_are_stopped_or_looked_at(monkeypatch, case):
    """What leaves a layer is another tensor than what went in: neither would reach the one it was meant for."""
    _, traces = both(monkeypatch, SEEN_BY_AUTOGRAD[case], batch())
    assert traces.whole == 1 and not traces.layers
    assert both(monkeypatch, Around(*blocks()), batch())[1].layers


class InPlace(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y += x
        return F.relu_(y * 2)


def test_what_a_layer_writes_to_of_its_own_is_its_business(monkeypatch):
    """Views of what was written to are made again when they are next used: here, where the layer ends."""
    model = Stack(*(InPlace() for _ in range(N)))
    found, traces = both(monkeypatch, model, batch(), read=dataflow)
    assert reused(traces, layers=1)
    compare(found, model, ((batch(),), {}))


class Mixed(Stack):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = super().forward(x)
        return super().forward(x)


def test_autocast_around_layers(monkeypatch):
    model = Mixed(*blocks())
    assert reused(both(monkeypatch, model, batch())[1], layers=2)


class Careful(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = self.up(x).float()
        return super().forward(x) + y


def test_autocast_and_no_grad_inside(monkeypatch):
    traces = both(monkeypatch, Stack(*(Careful() for _ in range(N))), batch())[1]
    assert traces.whole == 1 and traces.layers


class Checkpointed(Stack):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


def test_checkpointed_layers_are_regions_of_their_own(monkeypatch):
    marks = [f"blocks.{i}.up" for i in range(N)]
    found, traces = both(monkeypatch, Checkpointed(*blocks(drop=0.5)), batch(), marks=marks)
    assert reused(traces, layers=1)
    assert len({n.meta["region"] for n in found.gm.graph.nodes if n.meta.get("region")}) == N


def test_layers_within_stages(monkeypatch):
    class Stage(Stack):
        pass

    model = nn.Sequential(Stage(*blocks(), *blocks()), Stage(*blocks(), *blocks()))
    assert reused(both(monkeypatch, model, batch())[1], layers=1)


class Library(nn.Module):
    """All its own lines are torch's, so that what remains differs from call to call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.TransformerEncoderLayer(4, 1, 8, 0.0, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.a(x)
        x = self.b(x)
        return self.c(x)


def test_torch_layers_have_the_line_that_calls_them(monkeypatch):
    found, traces = both(monkeypatch, Library(), batch())
    assert reused(traces, layers=1)
    assert len({n.meta["line"] for n in found.gm.graph.nodes if n.op == "call_function"}) == 3


def test_symbolic_sizes_are_left_alone(monkeypatch):
    assert reused(both(monkeypatch, Stack(*blocks()), batch(), symbolic=True)[1], layers=0)


COUNT = torch.zeros(())


class Counting(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        COUNT.add_(1)
        return super().forward(x)


def test_an_error_inside_a_layer_is_the_same(monkeypatch):
    errors = []
    for find in (trace_layers.repeats, lambda graph: []):
        monkeypatch.setattr(trace_layers, "repeats", find)
        with pytest.raises(ShardingError) as caught:
            trace(Stack(*(Counting(scale=2.0) for _ in range(N))), (batch(),))
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "test_layers.py:" in errors[0]
