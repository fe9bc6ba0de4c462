"""data_parallel: the same outputs, gradients and errors as the module on the whole batch."""

# torch types whatever a module holds as Tensor | Module, and a gradient as Tensor | None.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import copy
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from shardc.runtime.replicas.replicas import data_parallel

TWO = ["cpu", "cpu"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own runs on CUDA only")


class Calls(nn.Module):
    """Calls a function with itself, so that a test can look at what a replica sees."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Out(NamedTuple):
    y: Tensor
    nothing: None


# --- values and gradients


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_outputs_and_gradients_are_the_modules_own(count: int):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    reference = copy.deepcopy(net)
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    x_reference = x.detach().requires_grad_()
    out, expected = data_parallel(net, x, ["cpu"] * count), reference(x_reference)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad)
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_first_and_second_derivatives_are_right():
    class Scaled(nn.Module):
        def __init__(self, scale: Tensor):
            super().__init__()
            self.register_buffer("scale", scale)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sin()

    def f(scale: Tensor, x: Tensor) -> Tensor:
        return data_parallel(Scaled(scale), x, TWO)

    scale = torch.randn(2, dtype=torch.double, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(f, (scale, x))
    assert torch.autograd.gradgradcheck(f, (scale, x))


def test_a_gradient_penalty_trains_the_parameters():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(4, 2, dtype=torch.double, requires_grad=True)
    grads = []
    for run in (net, lambda x: data_parallel(net, x, TWO)):
        net.zero_grad()
        (slope,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        slope.norm().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for expected, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_batch_norm_buffers_follow_replica_0():
    net, alone = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    x = torch.randn(6, 2)
    data_parallel(net, x, TWO)
    alone(x[:3])
    torch.testing.assert_close(net.running_mean, alone.running_mean)
    assert net.num_batches_tracked == 1


def test_a_first_layer_in_place_works_as_it_does_alone():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
    x = torch.randn(4, 2, requires_grad=True)
    torch.testing.assert_close(data_parallel(net, x * 1, TWO), net(x * 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module_runs_in_all_threads():
    net, x = nn.Linear(2, 2), torch.randn(4, 2)
    torch.testing.assert_close(data_parallel(torch.compile(net, backend="eager"), x, TWO), net(x))


# --- inputs


def test_a_tuple_is_the_argument_list():
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(data_parallel(Calls(torch.add), (x, y), TWO), x + y)


@pytest.mark.parametrize("kind", [list, lambda parts: {"a": parts[0], "b": parts[1]}], ids=["list", "dict"])
def test_a_list_or_dict_is_one_argument(kind):
    x, y = torch.randn(4, 2), torch.randn(4, 2)

    def total(parts):
        return sum(parts.values() if isinstance(parts, dict) else parts)

    torch.testing.assert_close(data_parallel(Calls(total), kind([x, y]), TWO), x + y)


def test_numbers_none_and_keywords_reach_every_replica():
    x = torch.randn(4, 2)

    def scaled(x, by, nothing, *, shift, times):
        assert nothing is None
        return x * by * times + shift

    out = data_parallel(Calls(scaled), (x, 2, None), TWO, module_kwargs={"shift": x, "times": 3})
    torch.testing.assert_close(out, 7 * x)


def test_fewer_rows_than_devices_use_fewer_devices():
    sizes: list[int] = []
    net = Calls(lambda x: sizes.append(len(x)) or x * 2)
    out = data_parallel(net, torch.ones(2, 1), ["cpu"] * 5)
    assert out.tolist() == [[2], [2]] and sizes == [1, 1]


def test_no_rows_at_all_give_no_rows():
    assert data_parallel(nn.Linear(3, 2), torch.empty(0, 3), TWO).shape == (0, 2)


@pytest.mark.parametrize("inputs", [None, ()])
def test_a_module_without_inputs_runs_once(inputs):
    assert data_parallel(Calls(lambda: torch.ones(3)), inputs, TWO).shape == (3,)


def test_one_device_runs_the_module_itself():
    net = nn.BatchNorm1d(2)
    runs: list[nn.Module] = []
    net.register_forward_hook(lambda module, args, out: runs.append(module))
    data_parallel(net, torch.randn(4, 2), ["cpu"])
    assert runs == [net]
    assert data_parallel(Calls(torch.sum), torch.ones(2), ["cpu"]).dim() == 0


# --- outputs


def test_outputs_are_joined_in_their_structure():
    def forward(x):
        return {"out": Out(x * 2, None), "list": [x], "loss": x.sum(), "count": 7}

    out = data_parallel(Calls(forward), torch.ones(3, 1), TWO)
    assert isinstance(out["out"], Out) and out["out"].y.shape == (3, 1) and out["out"].nothing is None
    assert out["list"][0].shape == (3, 1) and out["loss"].tolist() == [2, 1] and out["count"] == 7


def test_a_number_that_differs_between_replicas_is_refused():
    with pytest.raises(ValueError, match="cannot gather 2, 1: a plain value must be the same"):
        data_parallel(Calls(len), torch.ones(3), TWO)


# --- modes


@pytest.mark.parametrize("count", [1, 2])
def test_no_grad_and_inference_mode_hold_inside(count: int):
    net, x = nn.Linear(2, 2), torch.randn(4, 2)
    devices = ["cpu"] * count
    with torch.no_grad():
        assert not data_parallel(net, x, devices).requires_grad
    with torch.inference_mode():
        assert data_parallel(net, x, devices).is_inference()


@pytest.mark.parametrize("count", [1, 2])
def test_autocast_holds_inside(count: int):
    net, x = nn.Linear(2, 2), torch.randn(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = data_parallel(net, x, ["cpu"] * count)
        torch.testing.assert_close(out, net(x))
    assert out.dtype == torch.bfloat16


def test_each_replica_has_its_own_thread():
    threads: list[threading.Thread] = []
    data_parallel(Calls(lambda x: threads.append(threading.current_thread()) or x), torch.ones(2), TWO)
    assert len({id(thread) for thread in threads} | {id(threading.current_thread())}) == 3


# --- errors


def test_a_key_error_in_a_replica_arrives_with_number_and_traceback():
    def lookup(x):
        return {0.0: x}[x[0].item()]

    with pytest.raises(KeyError) as caught:
        data_parallel(Calls(lookup), torch.arange(2.0), TWO)
    assert type(caught.value) is KeyError
    text = str(caught.value)
    assert text.startswith("Caught KeyError in replica 1 on device cpu.\nOriginal Traceback (most recent call")
    assert "in lookup" in text and text.rstrip().endswith("KeyError: 1.0")


def test_no_devices_and_unknown_devices_are_errors():
    with pytest.raises(ValueError, match="devices is empty"):
        data_parallel(nn.Linear(1, 1), torch.ones(1, 1), [])
    with pytest.raises(ValueError, match="unknown device 'warp'"):
        data_parallel(nn.Linear(1, 1), torch.ones(1, 1), ["warp"])


@pytest.mark.parametrize("count", [1, 2])
def test_uninitialised_modules_are_refused(count: int):
    with pytest.raises(RuntimeError, match=r"uninitialised tensors: weight \(lazy\), bias \(lazy\)"):
        data_parallel(nn.LazyLinear(2), torch.ones(2, 1), ["cpu"] * count)


def test_inputs_of_different_lengths_that_would_lose_rows_are_refused():
    with pytest.raises(ValueError, match="different numbers"):
        data_parallel(Calls(torch.add), (torch.ones(4), torch.ones(1)), TWO)


@pytest.mark.parametrize("count", [1, 2])
def test_a_module_on_another_device_than_the_first_is_refused_by_name(count: int):
    with FakeTensorMode():  # a device that this machine may lack
        net = nn.ParameterList([nn.Parameter(torch.empty(2, device="cuda:1"), requires_grad=False)])
    with pytest.raises(RuntimeError, match=r"on cpu, the first .* but 0 is on cuda:1; .*module.to\('cpu'\)"):
        data_parallel(net, torch.ones(2), ["cpu"] * count)


@needs_cuda
def test_on_cuda_torchs_data_parallel_agrees():
    net, x = nn.Linear(3, 2).cuda(), torch.randn(6, 3, requires_grad=True)
    devices = list(range(torch.cuda.device_count()))
    results = []
    for run in (data_parallel, nn.parallel.data_parallel):
        net.zero_grad()
        x.grad = None
        out = run(net, x, devices)
        out.square().sum().backward()
        results.append((out, x.grad, net.weight.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
