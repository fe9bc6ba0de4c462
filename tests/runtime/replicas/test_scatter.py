"""Scatter and gather: where rows go, which structures survive, and what is refused."""

import dataclasses
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from shardc.runtime.replicas.scatter import gather, scatter

CPU = torch.device("cpu")


class Pair(NamedTuple):
    a: Tensor
    b: object


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Tensor
    scale: float


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9])
def test_rows_go_where_chunk_puts_them(rows: int, devices: int):
    x = torch.randn(rows, 2)
    parts, expected = scatter(x, [CPU] * devices), x.chunk(devices)
    assert [part.shape for part in parts] == [part.shape for part in expected]
    assert torch.equal(gather(parts, CPU), x)


def test_structure_and_plain_values_are_kept():
    x = torch.arange(4)
    value = {"list": [x, None], "tuple": (x, 3), "pair": Pair(x, "name"), "empty": [], "flag": True}
    first, second = scatter(value, [CPU, CPU])
    assert first["list"][0].tolist() == [0, 1] and second["list"][0].tolist() == [2, 3]
    assert first["list"][1] is None and first["tuple"][1] == 3 and first["flag"] is True
    assert isinstance(first["pair"], Pair) and first["pair"].b == "name"
    assert first["empty"] == [] and list(first) == list(value)


def test_dict_classes_and_dataclasses_survive_a_round_trip():
    x = torch.arange(4)
    default = defaultdict(int, x=x)
    for value in (OrderedDict(x=x), default, Batch(x, 0.5)):
        parts = scatter(value, [CPU, CPU])
        joined = gather(parts, CPU)
        assert type(parts[0]) is type(joined) is type(value)
        assert torch.equal(joined.x if isinstance(joined, Batch) else joined["x"], x)
    assert scatter(default, [CPU])[0]["absent"] == 0


def test_a_list_of_tensors_is_cut_tensor_by_tensor():
    parts = scatter([torch.zeros(4), torch.ones(3)], [CPU, CPU])
    assert [[t.shape[0] for t in part] for part in parts] == [[2, 2], [2, 1]]


def test_a_0d_tensor_goes_to_every_device():
    parts = scatter((torch.zeros(2), torch.tensor(7)), [CPU, CPU])
    assert [part[1].item() for part in parts] == [7, 7]


def test_values_without_a_tensor_go_to_every_device():
    assert scatter(("a", 1), [CPU, CPU]) == [("a", 1), ("a", 1)]


def test_an_unknown_object_goes_to_every_device_as_it_is():
    thing = object()
    assert [part is thing for part in scatter(thing, [CPU, CPU])] == [True, True]


def test_parts_lie_in_the_input_and_pass_gradients_back():
    x = torch.randn(4, 2, requires_grad=True)
    first, second = scatter(x, [CPU, CPU])
    assert first.data_ptr() == x.data_ptr()
    (first.sum() + 3 * second.sum()).backward()
    assert grad(x)[:, 0].tolist() == [1, 1, 3, 3]


def test_a_part_may_be_written_in_place():
    x = torch.randn(4, requires_grad=True)
    first, _ = scatter(x * 1, [CPU, CPU])
    first.mul_(2).sum().backward()
    assert grad(x).tolist() == [2, 2, 0, 0]


def test_tensors_cut_into_different_numbers_of_parts_are_refused():
    with pytest.raises(ValueError, match="one of 4 rows into 2 and one of 1 rows into 1"):
        scatter((torch.zeros(4), torch.zeros(1)), [CPU, CPU])


def test_a_packed_sequence_is_refused():
    with pytest.raises(TypeError, match="PackedSequence"):
        scatter(pack_sequence([torch.zeros(2), torch.zeros(1)]), [CPU, CPU])


# --- gather


def test_0d_outputs_become_a_vector():
    assert gather([torch.tensor(1.0), torch.tensor(2.0)], CPU).tolist() == [1, 2]


def test_named_results_of_torch_are_joined():
    outputs = [torch.zeros(2, 3).max(1), torch.ones(1, 3).max(1)]
    assert gather(outputs, CPU).values.tolist() == [0, 0, 1]


def test_nested_outputs_are_joined():
    outputs = [{"a": [torch.zeros(1), (torch.ones(2),)], "n": None} for _ in range(2)]
    joined = gather(outputs, CPU)
    assert joined["a"][0].shape == (2,) and joined["a"][1][0].shape == (4,) and joined["n"] is None


def test_channels_last_outputs_stay_channels_last():
    outputs = [torch.zeros(1, 3, 2, 2).to(memory_format=torch.channels_last) for _ in range(2)]
    assert gather(outputs, CPU).is_contiguous(memory_format=torch.channels_last)


def test_a_gather_passes_gradients_back():
    parts = [torch.randn(2, requires_grad=True), torch.randn(1, requires_grad=True)]
    gather(parts, CPU).mul(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert grad(parts[0]).tolist() == [1, 2] and grad(parts[1]).tolist() == [3]


@pytest.mark.parametrize("value", [None, 3, 2.5, float("nan"), True, "name", b"bytes", 1j])
def test_a_plain_value_that_is_the_same_everywhere_is_kept(value: object):
    assert gather([value, value], CPU) is value


@pytest.mark.parametrize(
    "outputs, error, text",
    [
        ([2, 3], ValueError, "cannot gather 2, 3: a plain value must be the same"),
        ([torch.zeros(1), None], ValueError, "different types: Tensor, NoneType"),
        ([[1], (1,)], ValueError, "different types: list, tuple"),
        ([[1], [1, 1]], ValueError, r"different keys: \[0\]; \[0, 1\]"),
        ([{"a": 1}, {"b": 1}], ValueError, r"different keys: \['a'\]; \['b'\]"),
        ([object(), object()], TypeError, "cannot gather outputs of type object"),
    ],
)
def test_outputs_without_a_joint_value_are_refused(outputs: list[object], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        gather(outputs, CPU)
