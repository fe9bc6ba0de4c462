"""How a user's arguments map onto a traced graph's inputs, and its outputs onto what the user gets."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from shardc.compiler.ir.signature import InputKind, OutputKind, TensorInfo
from shardc.compiler.trace.trace import trace
from tests.trace.eager import check
from tests.trace.test_zoo import Flexible, Partial, Structured

X = torch.randn(3, 4)


@pytest.fixture(scope="module")
def flexible():
    return trace(Flexible(), (X, torch.ones(4)), {"scale": 2, "mask": None}).signature


def test_tensors_come_in_batch_order(flexible):
    x, more = torch.zeros(3, 4), torch.zeros(4)
    first, second = flexible.flatten_inputs((x, more), {"mask": None, "scale": 2})
    assert first is x and second is more
    assert [flexible.inputs[i].name for i in flexible.indices(InputKind.BATCH)] == ["x", "more[0]"]


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((X,), {"scale": 2, "mask": None}, TypeError, "traced with 2 positional and 2 keyword arguments (mask, scale), "
         "called with 1 positional and 2 keyword arguments (mask, scale)"),
        ((X, X), {"scale": 2}, TypeError, "called with 2 positional and 1 keyword arguments (scale)"),
        ((X, X), {"scale": 3, "mask": None}, ValueError, "scale was 2 when traced, now it is 3"),
        ((X, X), {"scale": 2.0, "mask": None}, TypeError, "scale was 2 when traced, now it is 2.0"),
        ((X, X), {"scale": 2, "mask": X}, TypeError, "mask was None when traced, now it is a tensor of shape (3, 4)"),
        ((X, None), {"scale": 2, "mask": None}, TypeError, "more[0] was a tensor when traced, now it is None"),
        ((X, [X]), {"scale": 2, "mask": None}, TypeError, "more[0] was a tensor when traced, now it is a list"),
    ],
)  # fmt: skip
def test_another_form_of_call_is_refused(flexible, args, kwargs, error, message):
    with pytest.raises(error) as caught:
        flexible.flatten_inputs(args, kwargs)
    assert message in str(caught.value)


def test_true_is_not_one():
    class Twice(nn.Module):
        def forward(self, x, flag):
            return x * 2 if flag else x

    signature = trace(Twice(), (X, True)).signature
    assert len(signature.flatten_inputs((X, True), {})) == 1
    with pytest.raises(TypeError, match="flag was True when traced, now it is 1"):
        signature.flatten_inputs((X, 1), {})


def test_nan_is_nan():
    class Adds(nn.Module):
        def forward(self, x, value):
            return x + value

    signature = trace(Adds(), (X, float("nan"))).signature
    assert len(signature.flatten_inputs((X, float("nan")), {})) == 1


def test_another_structure_is_refused():
    signature = trace(Structured(), ({"x": X, "more": [torch.ones(4)]},)).signature
    assert len(signature.flatten_inputs(({"more": [torch.ones(4)], "x": X},), {})) == 2
    with pytest.raises(ValueError, match="nested otherwise than when traced"):
        signature.flatten_inputs(({"x": X, "more": []},), {})


def test_numbers_none_and_repeats_survive_among_outputs():
    signature = trace(Structured(), ({"x": X, "more": [torch.ones(4)]},)).signature
    values = [torch.tensor(float(i)) for i in range(3)]
    back = signature.unflatten_outputs(values)
    assert back["pair"].hidden is values[0] and back["pair"].rows == 3
    assert back["list"] == [values[1], None, 2.5]
    assert all(x is values[0] for x in back["both"])  # what is one tensor to eager
    assert type(back["pair"]).__name__ == "Pair"
    with pytest.raises(ValueError, match="forward returns 3 tensors, given 2"):
        signature.unflatten_outputs(values[:2])


@dataclass
class Result:
    loss: Tensor
    logits: Tensor | None = None


def test_registered_dataclasses_are_returned_as_they_are():
    torch.export.register_dataclass(Result, serialized_type_name="tests.Result")

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            return OrderedDict(result=Result(y.sum(), y), plain=Result(y.sum()))

    traced = check(Head(), X)
    names = [traced.signature.outputs[i].name for i in traced.signature.indices(OutputKind.OUTPUT)]
    assert names == ["output['result'].loss", "output['result'].logits", "output['plain'].loss"]


def test_inputs_are_found_by_any_of_their_names():
    signature = trace(Partial(), (X,)).signature
    assert signature.tied == {"b.weight": "a.weight"}
    index = signature.index("b.weight")
    assert index == signature.index("a.weight") and signature.inputs[index].name == "a.weight"
    with pytest.raises(KeyError):
        signature.index("c.weight")


def test_tangents_and_gradients_refer_to_what_they_belong_to():
    signature = trace(Partial(), (X.clone().requires_grad_(),)).signature
    for i in signature.indices(InputKind.TANGENT):
        of = signature.inputs[i].of
        assert of is not None
        output = signature.outputs[of]
        assert output.kind is OutputKind.OUTPUT and output.requires_grad and output.name == signature.inputs[i].name
    for i in signature.indices(OutputKind.GRADIENT):
        of = signature.outputs[i].of
        assert of is not None
        source = signature.inputs[of]
        assert source.requires_grad and source.name == signature.outputs[i].name


def test_metadata_of_a_tensor():
    info = TensorInfo.of(torch.empty(2, 3, dtype=torch.float64).t().requires_grad_())
    assert info == TensorInfo((3, 2), (1, 3), torch.float64, torch.device("cpu"), True)
