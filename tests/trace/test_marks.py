"""Marks: module borders and constraints, each one node in forward and one in backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardc.compiler.ir.marks import MarkKey, constrain, layout_text, parse_key, parse_placement, placement_text
from shardc.compiler.ir.signature import Traced
from shardc.compiler.trace.trace import trace
from tests.trace.eager import check

MARK = torch.ops.shardc.mark.default


def keys(traced: Traced, phase: str) -> list[str]:
    nodes = traced.gm.graph.find_nodes(op="call_function", target=MARK)
    return [str(n.args[1]) for n in nodes if n.meta["phase"] == phase]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, extra=None, *, scale=None):
        y = self.fc(x)
        if extra is not None:
            y = y + extra["a"] + extra["b"][0]
        return (y, {"half": y / 2}) if scale is None else y * scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def forward(self, x, more):
        y, rest = self.layer(x, {"a": more, "b": [more]})
        return self.layer(y, scale=rest["half"])


def test_a_border_has_a_key_per_tensor_and_use():
    traced = check(Model(), torch.randn(3, 4), torch.randn(4), marks=["layer"])
    first = ["layer|in|0", "layer|in|1['a']", "layer|in|1['b'][0]", "layer|out|0", "layer|out|1['half']"]
    second = ["layer|in|0", "layer|in|kw:scale", "layer|out|"]
    assert keys(traced, "forward") == first + second
    with_gradient = ["layer|out|0", "layer|out|1['half']", *second]  # x itself requires no grad
    assert sorted(keys(traced, "backward")) == sorted(key + "|grad" for key in with_gradient)


def test_a_mark_belongs_to_the_module_whose_border_it_is():
    traced = trace(Model(), (torch.randn(3, 4), torch.randn(4)), marks=["layer"])
    for node in traced.gm.graph.find_nodes(op="call_function", target=MARK):
        assert node.meta["path"] == "layer"
        assert node.meta["where"].startswith("test_marks.py:")


def test_the_root_has_a_border():
    traced = check(nn.Linear(4, 4), torch.randn(3, 4), marks=[""])
    assert keys(traced, "forward") == ["|in|0", "|out|"]
    assert keys(traced, "backward") == ["|out||grad"]


def test_integers_are_marked_in_forward_alone():
    traced = check(nn.Embedding(5, 3), torch.tensor([1, 2]), marks=[""])
    assert keys(traced, "forward") == ["|in|0", "|out|"]


def test_marks_leave_the_rest_of_the_graph_as_it_is():
    inputs = (torch.randn(3, 4), torch.randn(4))
    module = Model()
    plain = [str(n.target) for n in trace(module, inputs).gm.graph.nodes if n.op == "call_function"]
    marked = trace(module, inputs, marks=["", "layer", "layer.fc"]).gm.graph.nodes
    assert [str(n.target) for n in marked if n.op == "call_function" and n.target is not MARK] == plain


def test_hooks_are_gone_afterwards_on_success_and_on_error():
    module = Model()
    trace(module, (torch.randn(3, 4), torch.randn(4)), marks=["layer"])
    with pytest.raises(ValueError):
        trace(module, (torch.randn(3, 5), torch.randn(4)), marks=["layer"])
    for owner in module.modules():
        assert not owner._forward_hooks and not owner._forward_pre_hooks


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match="no module 'layers.0'"):
        trace(Model(), (torch.randn(3, 4), torch.randn(4)), marks=["layers.0"])


def test_a_scripted_module_is_refused():
    with pytest.raises(ValueError, match="'0' is a scripted module"):
        trace(nn.Sequential(torch.jit.script(nn.ReLU())), (torch.randn(3),), marks=["0"])


class InPlace(nn.Module):
    """Writes to a tensor that crossed a border, on either side of it, directly, through a view, out of sight."""

    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.relu = how, nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.same = nn.Identity()

    def forward(self, x):
        if self.how == "input":
            self.relu(self.same(x))
        y = self.fc(x)
        if self.how == "inside":
            self.relu(y)
        elif self.how == "outside":
            z = self.same(y)
            z[0] = 5.0
        elif self.how == "before":
            z = self.same(y)
            y.mul_(3)
            return y * z
        elif self.how == "view":
            self.relu(y[:, 1:])
        elif self.how == "chain":
            self.relu(self.same(self.same(y)))
        elif self.how == "last":
            self.relu(self.same(y))
            return y
        return y * y


@pytest.mark.parametrize("how", ["inside", "outside", "before", "view", "chain", "last", "input"])
@pytest.mark.parametrize("scripted", [False, True])
def test_a_write_to_a_marked_tensor_reaches_all_its_names(how, scripted):
    module = InPlace(how)
    if scripted:  # traced by dispatch
        module.add_module("fc", torch.jit.script(module.fc))
    traced = check(module, torch.randn(3, 4), marks=["relu", "same"])
    copies = traced.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default)
    assert bool(copies) == (how == "view")  # where strides differ


class Constrained(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.fc, self.layout = nn.Linear(4, 4), layout

    def forward(self, x):
        y = constrain(self.fc(x), self.layout)
        y += 1
        return F.relu(constrain(y, Shard(0)))


class Named:
    def to_text(self) -> str:
        return "dp=S(0), tp=R"


@pytest.mark.parametrize(
    "layout, text",
    [(Shard(1), "S(1)"), (Replicate(), "R"), (Partial("max"), "P(max)"), (Named(), "dp=S(0), tp=R")],
)
def test_constrain_is_kept_with_its_layout(layout, text):
    traced = check(Constrained(layout), torch.randn(3, 4))
    assert keys(traced, "forward") == [f"constrain|{text}", "constrain|S(0)"]
    assert keys(traced, "backward") == ["constrain|S(0)|grad", f"constrain|{text}|grad"]


def test_constrain_is_kept_when_tracing_by_dispatch():
    module = Constrained(Shard(1))
    module.add_module("fc", torch.jit.script(module.fc))
    assert keys(check(module, torch.randn(3, 4)), "forward") == ["constrain|S(1)", "constrain|S(0)"]


def test_constrain_is_nothing_in_eager():
    x = torch.randn(3)
    assert constrain(x, Shard(0)) is x


@pytest.mark.parametrize(
    "placement", [Shard(0), Shard(3), Replicate(), Partial(), Partial("avg"), _StridedShard(1, split_factor=3)]
)
def test_placements_survive_text(placement):
    back = parse_placement(placement_text(placement))
    assert back == placement and type(back) is type(placement)


@pytest.mark.parametrize("text", ["", "S", "S()", "S(a)", "R(0)", "Q", "P(mean)", "_S(1)", "S(0"])
def test_other_text_is_no_placement(text):
    with pytest.raises(ValueError, match="no placement reads"):
        parse_placement(text)


def test_a_layout_of_another_kind_is_a_type_error():
    with pytest.raises(TypeError, match="not str"):
        layout_text("S(0)")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "key, meaning",
    [
        ("layers.0|in|kw:mask", MarkKey("in", "layers.0", "kw:mask")),
        ("layers.0|out||grad", MarkKey("out", "layers.0", "", grad=True)),
        ("|in|1[0]", MarkKey("in", "", "1[0]")),
        ("constrain|dp=S(0)|grad", MarkKey("constrain", text="dp=S(0)", grad=True)),
    ],
)
def test_keys_are_taken_apart(key, meaning):
    assert parse_key(key) == meaning


def test_the_operator_obeys_torch_s_rules_for_operators():
    for x in (torch.randn(3, 4, requires_grad=True), torch.randn(4, 3).t().requires_grad_(), torch.arange(3)):
        torch.library.opcheck(MARK, (x, "key"))
