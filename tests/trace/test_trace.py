"""What a traced graph looks like, where its nodes come from, and that the module is left as it was."""

import gc
import logging
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from shardc.compiler.ir.signature import InputKind, OutputKind, TensorInfo
from shardc.compiler.trace.trace import trace
from tests.trace.eager import check, held
from tests.trace.test_zoo import GPT, MLP, Aliasing, Checkpointed, ConvNet, Partial, ScriptedChild

log = logging.getLogger(__name__)
HERE = Path(__file__).name
SAMPLES = {
    "mlp": lambda: (MLP(), torch.randn(3, 6, requires_grad=True)),
    "gpt": lambda: (GPT(), torch.randint(17, (2, 5))),
    "conv": lambda: (ConvNet(), torch.randn(4, 3, 8, 8)),
    "aliases": lambda: (Aliasing(), torch.randn(4, 4, requires_grad=True)),
    "partial": lambda: (Partial(), torch.randn(3, 4)),
    "checkpoint": lambda: (Checkpointed(), torch.randn(3, 6)),
    "scripted": lambda: (ScriptedChild(), torch.randn(3, 6)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
    "lstm": lambda: (nn.Sequential(nn.LSTM(4, 5)), torch.randn(3, 2, 4)),
}


@cache
def traced_sample(name):
    module, *args = SAMPLES[name]()
    return module, trace(module, args)


def calls(traced):
    return [n for n in traced.gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", SAMPLES)
def test_graph_is_flat_and_agrees_with_its_signature(name):
    _, traced = traced_sample(name)
    nodes = list(traced.gm.graph.nodes)
    count = len(traced.signature.inputs)
    assert [n.op for n in nodes[:count]] == ["placeholder"] * count
    assert {n.op for n in nodes[count:-1]} == {"call_function"}
    assert [n.name for n in nodes[:count]] == [i.node for i in traced.signature.inputs]
    results = nodes[-1].args[0]
    assert isinstance(results, tuple)
    assert [r and r.name for r in results] == [o.node for o in traced.signature.outputs]
    order = [i.kind for i in traced.signature.inputs]
    assert order == sorted(order, key=list(InputKind).index)
    order = [o.kind for o in traced.signature.outputs]
    assert order == sorted(order, key=list(OutputKind).index)


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_dead_or_of_torch_s_own_is_left(name):
    _, traced = traced_sample(name)
    for node in calls(traced):
        assert node.users or torch.Tag.nondeterministic_seeded in node.target.tags, node
        text = str(node.target)
        assert text.startswith(("aten.", "shardc.", "<built-in function getitem>")), text
        assert not text.startswith(("aten.detach", "aten.alias", "aten.lift", "aten._assert", "aten.sym")), text


@pytest.mark.parametrize("name", SAMPLES)
def test_every_node_says_where_it_comes_from(name):
    module, traced = traced_sample(name)
    fqns = dict(module.named_modules())
    for node in calls(traced):
        assert node.meta["path"] in fqns, node
        assert node.meta["phase"] in ("forward", "backward")
        assert isinstance(node.meta["region"], str)
        assert node.meta["line"] > 0 and Path(node.meta["file"]).is_absolute()
        assert node.meta["where"].startswith(f"{Path(node.meta['file']).name}:{node.meta['line']} in ")
    for node in traced.gm.graph.nodes:
        assert all(isinstance(v, FakeTensor) for v in _values(node)), node
    assert len({id(v.fake_mode) for node in traced.gm.graph.nodes for v in _values(node)}) == 1


def _values(node):
    value = node.meta.get("val", ())
    return [v for v in (value if isinstance(value, (list, tuple)) else (value,)) if v is not None]


@pytest.mark.parametrize("name", SAMPLES)
def test_phase_is_backward_exactly_for_what_only_gradients_need(name):
    _, traced = traced_sample(name)
    nodes = {n.name: n for n in traced.gm.graph.nodes}
    reached = set()
    stack = [nodes[o.node] for o in traced.signature.outputs if o.node and o.kind is not OutputKind.GRADIENT]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += node.all_input_nodes
    for node in calls(traced):
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        assert random or (node.meta["phase"] == "forward") == (node in reached), node


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        y = self.a(x)  # line of a
        for layer in self.b:
            y = F.gelu(layer(y))  # line of b
        return y + self.a(y)  # line of a again


def line_of(comment: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))


def test_forward_and_backward_nodes_have_the_line_and_module_of_their_operator():
    traced = trace(Two(), (torch.randn(3, 4),))
    places = {(n.meta["phase"], str(n.target), n.meta["path"], n.meta["where"]) for n in calls(traced)}
    first, second, third = (f"{HERE}:{line_of(c)} in forward" for c in ("line of a", "line of b", "line of a again"))
    assert {
        ("forward", "aten.addmm.default", "a", first),
        ("forward", "aten.addmm.default", "b.0", second),
        ("forward", "aten.gelu.default", "", second),
        ("forward", "aten.addmm.default", "a", third),
        ("backward", "aten.mm.default", "a", first),
        ("backward", "aten.mm.default", "b.0", second),
        ("backward", "aten.gelu_backward.default", "", second),
        ("backward", "aten.mm.default", "a", third),
    } <= places
    paths = {n.name: n.meta["path"] for n in traced.gm.graph.nodes if n.op == "placeholder"}
    assert paths == {"a_weight": "a", "a_bias": "a", "b_0_weight": "b.0", "b_0_bias": "b.0", "x": "", "tangent_0": ""}


def test_nothing_is_decomposed_beyond_what_autograd_sees():
    targets = {str(n.target) for name in ("gpt", "conv") for n in calls(traced_sample(name)[1])}
    assert {
        "aten.addmm.default",
        "aten.native_layer_norm.default",
        "aten.gelu_backward.default",
        "aten.embedding_dense_backward.default",
        "aten.convolution_backward.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
    } <= targets


def test_recomputed_nodes_are_those_of_the_checkpoint():
    _, traced = traced_sample("checkpoint")
    for node in calls(traced):
        inside = node.meta["path"].startswith("inner") and node.meta["phase"] == "forward"
        assert bool(node.meta["region"]) == inside


def test_random_operators_stay_though_unused():
    class Wasteful(nn.Module):
        def forward(self, x):
            torch.rand(3)
            return x + torch.rand(3)

    check(Wasteful(), torch.zeros(3))


SCRIPT = """
import torch
from shardc.compiler.trace.trace import trace
from tests.trace.test_zoo import GPT, ConvNet
for module, x in ((GPT(), torch.zeros(2, 5, dtype=torch.long)), (ConvNet(), torch.zeros(4, 3, 8, 8))):
    marks = [fqn for fqn, _ in module.named_modules()]
    traced = trace(module, (x,), marks=marks)
    print(traced.gm.code)
    print(traced.signature)
    for n in traced.gm.graph.nodes:
        print(n.format_node(), {k: str(v) for k, v in n.meta.items() if k != "val"})
"""


@pytest.mark.slow
def test_text_is_the_same_in_every_process():
    texts = set()
    for seed in ("0", "1", "77"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=root, env=env, capture_output=True, text=True, check=True
        )
        texts.add(done.stdout)
    assert len(texts) == 1 and "shardc.mark" in texts.pop()


def test_text_is_the_same_the_second_time():
    module, *args = SAMPLES["gpt"]()
    assert trace(module, args).gm.code == trace(module, args).gm.code


def snapshot(module: nn.Module):
    state = {}
    for fqn, owner in module.named_modules():
        for name, value in vars(owner).items():
            content = tuple(value.items()) if isinstance(value, dict) else ()
            state[fqn, name] = (id(value), [(k, id(v)) for k, v in content], isinstance(value, bool) and value)
    values = {n: (t.clone(), t._version, t.grad, t.requires_grad) for n, t in held(module).items()}
    return state, values


def assert_untouched(module, before):
    state, values = before
    now_state, now = snapshot(module)
    assert now_state == state
    for name, (value, version, grad, requires_grad) in values.items():
        assert torch.equal(now[name][0], value)
        assert now[name][1:] == (version, grad, requires_grad)


@pytest.mark.parametrize("name", ["gpt", "conv", "checkpoint", "lstm", "partial"])
def test_module_is_left_as_it_was(name):
    module, *args = SAMPLES[name]()
    before = snapshot(module)
    random = torch.get_rng_state()
    trace(module, args, marks=[fqn for fqn, _ in module.named_modules()])
    assert_untouched(module, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_module_is_left_as_it_was_when_tracing_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.seen, self.step = nn.BatchNorm1d(4), [], 0

        def forward(self, x):
            self.step += 1
            self.seen.append(self.bn(x))
            self.other = self.seen[-1]
            if self.other.sum() > 0:
                return x
            return -x

    module = Fails()
    before = snapshot(module)
    with pytest.raises(ValueError, match="value of a tensor"):
        trace(module, (torch.randn(3, 4),), marks=["bn"])
    assert_untouched(module, before)
    assert module.step == 0 and module.seen == []


def test_scripted_module_is_left_as_it_was():
    module, x = SAMPLES["scripted"]()
    before = {n: (t, t.clone()) for n, t in held(module).items()}
    trace(module, (x,))
    for name, tensor in held(module).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


class Sized(nn.Module):
    """Makes tensors on the devices of its parameter and its input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x):
        y = self.fc(x) + self.table + torch.zeros(6, device=self.fc.weight.device)
        return y + torch.arange(6, device=x.device)


@pytest.mark.parametrize("kind", ["fake", "meta", "inside a fake mode"])
def test_inputs_without_data_trace_alike(kind):
    module, x = Sized(), torch.randn(3, 4)
    expected = trace(module, (x,)).gm.code
    if kind == "meta":
        assert trace(module, (x.to("meta"),)).gm.code == expected
        return
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        if kind == "inside a fake mode":
            assert trace(module, (fake,)).gm.code == expected
    assert trace(module, (fake,)).gm.code == expected


def test_a_model_on_meta_traces_alike_without_meta_in_the_graph():
    with torch.device("meta"):
        module = Sized()
    traced = trace(module, (torch.empty(3, 4, device="meta"),))
    assert traced.gm.code == trace(Sized(), (torch.randn(3, 4),)).gm.code
    assert "meta" not in traced.gm.code
    assert all(p.is_meta for p in module.parameters())


def infos(module):
    return {name: TensorInfo.of(t) for name, t in held(module).items()}


def test_given_shapes_stand_for_shards():
    module, x = Sized(), torch.randn(3, 4)
    expected, params = trace(module, (x,)).gm.code, infos(module)
    for fqn, tensor in held(module).items():
        owner, name = module.get_submodule(fqn.rpartition(".")[0]), fqn.rpartition(".")[2]
        setattr(owner, name, type(tensor)(tensor[:1].detach().clone()))
    shard = module.fc.weight
    assert trace(module, (x,), params=params).gm.code == expected
    assert module.fc.weight is shard and shard.shape == (1, 4)


def test_distributed_parameters_trace_at_their_global_shape():
    module, x = Sized(), torch.randn(3, 4)
    expected = trace(module, (x,)).gm.code
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, t in list(module.fc.named_parameters()):
            setattr(module.fc, name, nn.Parameter(DTensor.from_local(t.detach(), mesh, run_check=False)))
        assert trace(module, (x,)).gm.code == expected
        assert isinstance(module.fc.weight, DTensor)
    finally:
        distributed.destroy_process_group()


def test_requires_grad_can_be_given():
    module, x = Sized(), torch.randn(3, 4)
    frozen = {n: TensorInfo(i.shape, i.stride, i.dtype, i.device) for n, i in infos(module).items()}
    traced = trace(module, (x,), params=frozen)
    assert {o.kind for o in traced.signature.outputs} == {OutputKind.OUTPUT}


def test_an_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="no parameter or buffer is called fc.wait"):
        trace(Sized(), (torch.randn(3, 4),), params={"fc.wait": infos(Sized())["fc.weight"]})


def test_a_large_model_costs_no_memory():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(2**17, 2**17) for _ in range(8)))  # half a terabyte
    traced = trace(module, (torch.empty(2**20, 2**17, device="meta"),))
    gradients = [n for n in calls(traced) if n.meta["val"].shape == (2**17, 2**17)]
    assert len(gradients) >= 16


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_the_caller_s_grad_mode_does_not_matter(mode):
    module, x = Sized(), torch.randn(3, 4)
    expected = [trace(module, (x,), grad=grad).gm.code for grad in (True, False)]
    with getattr(torch, mode)():
        assert [trace(module, (x,), grad=grad).gm.code for grad in (True, False)] == expected
        assert [trace(module, (torch.randn(3, 4),), grad=grad).gm.code for grad in (True, False)] == expected


@pytest.mark.slow
def test_many_shapes_and_modes_neither_fail_nor_pile_up():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    alive = {}
    for i in range(36):
        module.train(i % 2 == 0)
        traced = trace(module, (torch.randn(2 + i, 4),), grad=i % 3 > 0)
        shape = next(n for n in traced.gm.graph.nodes if n.name == "input_1").meta["val"].shape
        assert shape == (2 + i, 4) and all(type(s) is int for s in shape)
        if i % 12 == 11:
            gc.collect()
            alive[i] = sum(type(o) is FakeTensorMode for o in gc.get_objects())
    assert alive[35] - alive[11] < 12  # torch keeps a few, not one of each trace


def test_numbers_are_constants_however_often_they_change():
    class Scale(nn.Module):
        def forward(self, x, n, f):
            return x.repeat(n) * f

    for n in range(1, 5):
        check(Scale(), torch.randn(3), n, n / 2)


def test_a_child_may_have_any_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph, self.code, self.meta = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.add_module("0", nn.Linear(4, 4))

        def forward(self, input, lambda_=None):
            return self.meta(self.code(self.graph(self.get_submodule("0")(input))))

    traced = check(Named(), torch.randn(3, 4))
    assert [i.name for i in traced.signature.inputs][-2:] == ["input", "output"]


def test_tracing_is_silent(capfd):
    class Chatty(nn.Module):
        def forward(self, x):
            print("shape", x.shape)
            warnings.warn("careful", stacklevel=1)
            log.error("loud")
            with torch.profiler.record_function("scope"):
                return x + 1

    traced = trace(Chatty(), (torch.randn(3),))
    assert [str(n.target) for n in calls(traced)] == ["aten.add.Tensor"]
    assert capfd.readouterr() == ("", "")


def test_one_input_may_be_given_twice():
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor):
            return a * 2 + b

    x = torch.randn(3, requires_grad=True)
    traced = check(Sum(), x, x)
    assert [i.name for i in traced.signature.inputs][:2] == ["a", "b"]
