"""Replicas: what is shared with the source, what flows back to it, and what is refused."""

# torch types whatever a module holds as Tensor | Module, and a gradient as Tensor | None.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import copy
import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardc.runtime.replicas.devices import _Crossing
from shardc.runtime.replicas.replicas import replicas

TWO = ["cpu", "cpu"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own replicate runs on CUDA only")


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def tensors_of(replica: nn.Module, source: nn.Module) -> dict[str, Tensor]:
    """The replica's tensors under the source's names for parameters and buffers."""
    names = [*dict(source.named_parameters()), *dict(source.named_buffers())]
    return {name: functools.reduce(getattr, name.split("."), replica) for name in names}


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


# --- values and gradients


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_replica_computes_what_the_source_computes(count: int):
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    for replica in replicas(net, ["cpu"] * count):
        assert torch.equal(replica(x), net(x))


def test_devices_may_come_from_any_iterable():
    assert len(replicas(nn.Linear(3, 2), (name for name in ("cpu", "cpu:0", "cpu:1")))) == 3


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cpu:1", torch.device("cpu", 3)])
def test_every_number_of_cpu_is_the_cpu_of_the_source(name: str | torch.device):
    net = nn.Linear(3, 2)
    assert same_storage(replicas(net, [name])[0].weight, net.weight)


def test_gradients_of_all_replicas_add_up_in_the_source():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    by_hand = copy.deepcopy(net)
    inputs = [torch.randn(5, 3, dtype=torch.double) for _ in range(3)]
    for replica, x in zip(replicas(net, ["cpu"] * 3), inputs, strict=True):
        replica(x).square().sum().backward()
    sum(by_hand(x).square().sum() for x in inputs).backward()
    for ours, reference in zip(net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


def test_first_and_second_derivatives_are_right():
    net = nn.Linear(2, 2).double()

    def f(weight: Tensor, x: Tensor) -> Tensor:
        net.__dict__["_parameters"]["weight"] = weight  # a differentiable source
        first, second = replicas(net, TWO)
        return first(x).tanh() * second(x.square())

    weight = torch.randn(2, 2, dtype=torch.double, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(f, (weight, x))
    assert torch.autograd.gradgradcheck(f, (weight, x))


def test_a_parameter_without_use_gets_no_gradient():
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    sum(replica["used"](torch.ones(1, 2)).sum() for replica in replicas(net, TWO)).backward()
    assert net["used"].weight.grad is not None
    assert net["unused"].weight.grad is None


def test_a_hook_on_a_source_parameter_sees_the_summed_gradient_once():
    net, seen = nn.Linear(2, 1, bias=False), []
    net.weight.register_hook(seen.append)
    sum(replica(torch.ones(1, 2)).sum() for replica in replicas(net, TWO)).backward()
    assert len(seen) == 1 and torch.equal(seen[0], torch.full((1, 2), 2.0))


def test_detached_replicas_have_no_gradient_and_replica_0_still_shares_storage():
    net = norm_net()
    net[1].register_buffer("scale", torch.ones(4, requires_grad=True))
    first, second = replicas(net, TWO, detach=True)
    for replica in (first, second):
        assert not any(t.requires_grad for t in tensors_of(replica, net).values())
    ours, theirs = tensors_of(first, net), tensors_of(net, net)
    assert all(same_storage(ours[name], theirs[name]) for name in theirs)


def test_under_no_grad_replicas_have_no_gradient():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        made = replicas(net, TWO)
    assert not any(replica.weight.requires_grad for replica in made)


def test_a_frozen_parameter_stays_frozen():
    net = nn.Linear(2, 2)
    net.weight.requires_grad_(False)
    for replica in replicas(net, TWO):
        assert not replica.weight.requires_grad and replica.bias.requires_grad


# --- parameters are attributes, and no leaves


def test_replica_parameters_are_not_leaves_and_not_listed():
    for replica in replicas(norm_net(), TWO):
        assert list(replica.parameters()) == []
        assert not replica[0].weight.is_leaf and replica[0].weight.requires_grad


def test_parameter_lists_and_dicts_hold_the_replica_parameters():
    net: Any = nn.ModuleDict(
        {
            "list": nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))]),
            "dict": nn.ParameterDict({"a": nn.Parameter(torch.ones(3))}),
        }
    )
    for replica in replicas(net, TWO):
        assert [t.tolist() for t in replica["list"]] == [[1, 1], [0, 0]]
        assert not any(t.is_leaf for t in [*replica["list"], replica["dict"]["a"]])
        assert list(replica.parameters()) == []


def test_buffers_are_listed_under_the_same_names():
    net = norm_net()
    for replica in replicas(net, TWO):
        assert dict(replica.named_buffers()).keys() == dict(net.named_buffers()).keys()


def test_zero_grad_on_a_replica_warns_that_it_has_no_effect():
    (replica,) = replicas(nn.Linear(2, 2), ["cpu"])
    with pytest.warns(UserWarning, match="no effect"):
        replica.zero_grad()


# --- sharing


def test_replica_0_shares_storage_with_the_source_and_the_others_with_nothing():
    net = norm_net()
    source = tensors_of(net, net)
    first, *others = (tensors_of(replica, net) for replica in replicas(net, ["cpu"] * 3))
    assert all(same_storage(first[name], source[name]) for name in source)
    pointers = [t.untyped_storage().data_ptr() for held in (source, *others) for t in held.values()]
    assert len(set(pointers)) == len(pointers) == 3 * len(source)


def test_an_update_through_data_reaches_replica_0_only():
    net, x = nn.Linear(2, 2), torch.randn(3, 2)
    first, second = replicas(net, TWO)
    before = net(x)
    net.weight.data.mul_(2)
    assert torch.equal(first(x), net(x))
    assert torch.equal(second(x), before)


def test_buffer_updates_of_replica_0_reach_the_source():
    net, x = nn.BatchNorm1d(2), torch.randn(8, 2) + 5
    first, second = replicas(net, TWO)
    second(x)
    assert net.num_batches_tracked == 0 and net.running_mean.tolist() == [0, 0]
    first(x)
    assert net.num_batches_tracked == 1 and net.running_mean.min() > 0.1


def test_a_submodule_used_twice_is_one_object_inside_each_replica():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.outer = nn.Sequential(self.inner, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x))

    net, x = Twice(), torch.randn(3, 2)
    first, second = replicas(net, TWO)
    for replica in (first, second):
        assert replica.inner is replica.outer[0]
        assert torch.equal(replica(x), net(x))
    assert first.inner is not second.inner and first.inner is not net.inner


def test_modules_that_hold_each_other_do_so_inside_each_replica():
    net: Any = nn.Linear(2, 2)
    net.child = nn.Linear(2, 2)
    net.child.parent = net
    for replica in replicas(net, TWO):
        assert replica.child.parent is replica and replica is not net


def test_tied_parameters_stay_tied_inside_each_replica():
    net = nn.ModuleDict({"emb": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    net["head"].weight = net["emb"].weight
    first, second = replicas(net, TWO)
    for replica in (first, second):
        assert replica["head"].weight is replica["emb"].weight
    assert first["head"].weight is not second["head"].weight


def test_one_parameter_under_two_names_stays_one():
    net = nn.Linear(2, 2)
    net.other_name = net.weight
    for replica in replicas(net, TWO):
        assert replica.other_name is replica.weight and not replica.weight.is_leaf


def test_none_children_parameters_and_buffers_stay_none():
    net = nn.Linear(2, 2, bias=False)
    net.register_module("child", None)
    net.register_buffer("table", None)
    for replica in replicas(net, TWO):
        assert replica._parameters == {"bias": None} and replica.bias is None
        assert replica._modules == {"child": None} and replica._buffers == {"table": None}


def test_exactly_the_bytes_of_the_later_replicas_are_allocated():
    class Allocated(TorchDispatchMode):
        storages: dict[int, int] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
            return result

    net = norm_net()
    net.append(nn.Linear(3, 4))
    net[3].weight = net[0].weight  # tied: copied once
    with Allocated() as allocated:
        made = replicas(net, ["cpu"] * 3)
    source = tensors_of(net, net).values()
    for tensor in source:
        allocated.storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(allocated.storages.values()) == 2 * sum(t.numel() * t.element_size() for t in source)
    assert len(made) == 3


def test_work_grows_linearly_in_the_number_of_parameters():
    def python_calls(layers: int) -> int:
        net, events = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))), []
        before = sys.getprofile()
        sys.setprofile(lambda frame, event, arg: events.append(event))
        try:
            replicas(net, TWO)
        finally:
            sys.setprofile(before)
        return len(events)

    python_calls(1)  # the first run fills caches
    ten, twenty, forty = map(python_calls, (10, 20, 40))
    assert forty - twenty < 2.2 * (twenty - ten)  # caches and the collector add a few calls of their own


# --- kinds of tensors


def test_integer_and_bool_buffers_keep_their_dtype():
    net = nn.Module()
    net.register_buffer("ids", torch.arange(3))
    net.register_buffer("mask", torch.tensor([True, False]))
    for replica in replicas(net, TWO):
        assert torch.equal(replica.ids, net.ids) and replica.ids.dtype == torch.int64
        assert torch.equal(replica.mask, net.mask) and replica.mask.dtype == torch.bool


def test_a_non_persistent_buffer_stays_out_of_the_state_dict():
    net = nn.Module()
    net.register_buffer("table", torch.ones(2), persistent=False)
    assert all(replica.state_dict() == {} for replica in replicas(net, TWO))


def test_a_complex_parameter_keeps_its_dtype_and_gets_its_gradient():
    net = nn.ParameterList([nn.Parameter(torch.randn(3, dtype=torch.complex64))])
    first, second = replicas(net, TWO)
    assert first[0].dtype == second[0].dtype == torch.complex64
    (first[0].abs().sum() + second[0].abs().sum()).backward()
    reference = net[0].detach().requires_grad_()
    (2 * reference.abs().sum()).backward()
    torch.testing.assert_close(net[0].grad, reference.grad)


def test_a_channels_last_weight_stays_channels_last_and_so_does_its_gradient():
    net = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    made = replicas(net, TWO)
    for replica in made:
        assert replica.weight.is_contiguous(memory_format=torch.channels_last)
        assert replica.weight.stride() == net.weight.stride()
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    sum(replica(x).sum() for replica in made).backward()
    assert net.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_an_embedding_with_sparse_gradients_gets_the_sparse_sum():
    net = nn.Embedding(6, 2, sparse=True)
    ids = [torch.tensor([0, 1]), torch.tensor([1, 5])]
    sum(r(i).sum() for r, i in zip(replicas(net, TWO), ids, strict=True)).backward()
    assert net.weight.grad.layout == torch.sparse_coo
    assert net.weight.grad.to_dense()[:, 0].tolist() == [1, 2, 0, 0, 0, 1]


def test_a_copy_to_another_device_passes_sparse_gradients_and_second_derivatives():
    cpu = torch.device("cpu")  # the crossing itself does not ask whether the device differs
    net = nn.Embedding(3, 2, sparse=True)
    F.embedding(torch.tensor([1]), _Crossing.apply(net.weight, cpu), sparse=True).sum().backward()
    assert net.weight.grad.layout == torch.sparse_coo
    x = torch.randn(3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: _Crossing.apply(x, cpu).pow(3), x)


class Scaled(nn.Module):
    """A buffer that requires grad, beside one that does not."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("offset", torch.ones(2, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.square() + self.offset


def test_a_buffer_that_requires_grad_gets_its_gradient_and_the_other_none():
    scale = torch.randn(2, dtype=torch.double, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)

    def f(scale: Tensor, x: Tensor) -> Tensor:
        first, second = replicas(Scaled(scale), TWO)
        assert not first.offset.requires_grad and not second.offset.requires_grad
        return first(x) * second(x.sin())

    assert torch.autograd.gradcheck(f, (scale, x))
    assert torch.autograd.gradgradcheck(f, (scale, x))


def test_a_module_on_another_device_shares_nothing_with_replica_0():
    with FakeTensorMode(), torch.no_grad():  # a device that this machine may lack
        net: Any = nn.ParameterList([nn.Parameter(torch.empty(2, device="cuda:1"), requires_grad=False)])
        (replica,) = replicas(net, ["cpu"])
        assert replica[0].device == torch.device("cpu") and net[0].device == torch.device("cuda:1")


# --- code and attributes


def test_code_and_plain_attributes_are_shared_and_never_deep_copied():
    class Config:
        def __deepcopy__(self, memo):
            raise AssertionError("deep copied")

    net = nn.Linear(2, 2)
    net.config, net.history = Config(), []
    for replica in replicas(net, TWO):
        assert type(replica) is type(net)
        assert replica.forward.__func__ is net.forward.__func__
        assert replica.config is net.config and replica.history is net.history


def test_a_graph_module_keeps_its_generated_class():
    net = torch.fx.symbolic_trace(norm_net().eval())
    x = torch.randn(3, 3)
    for replica in replicas(net, TWO):
        assert type(replica) is type(net) and replica.graph is net.graph
        assert torch.equal(replica(x), net(x))


def test_the_training_flag_and_hooks_are_carried():
    net, calls = nn.Sequential(nn.Linear(2, 2)).eval(), []
    net[0].register_forward_hook(lambda module, args, out: calls.append(module))
    for replica in replicas(net, TWO):
        replica(torch.ones(1, 2))
        assert not replica.training and not replica[0].training and calls[-1] is replica[0]
    assert len(calls) == 2


def test_what_is_registered_on_a_replica_does_not_reach_the_source():
    net = nn.Linear(2, 2)
    (replica,) = replicas(net, ["cpu"])
    replica.register_forward_hook(lambda *_: None)
    replica.register_buffer("extra", torch.ones(1), persistent=False)
    replica.child = nn.Linear(1, 1)
    assert not net._forward_hooks and not net._buffers and not net._modules
    assert not net._non_persistent_buffers_set


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_uses_its_own_weight_list(kind: type[nn.RNNBase]):
    net, x = kind(2, 3), torch.randn(4, 2)
    expected = net(x)[0]
    _, second = replicas(net, TWO)
    assert all(
        a is getattr(second, name) for a, name in zip(second._flat_weights, second._flat_weights_names, strict=True)
    )
    net.weight_ih_l0.data.zero_()
    assert torch.equal(second(x)[0], expected)


def test_a_parametrized_weight_is_computed_from_the_replica_parameters():
    net, x = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), torch.randn(3, 2)
    expected = net(x)
    _, second = replicas(net, TWO)
    net.parametrizations.weight.original1.data.zero_()
    assert torch.equal(second(x), expected)


class Patched(nn.Module):
    """Reaches its child by whatever `reach` puts into the instance."""

    def __init__(self, reach: Callable[[nn.Module], Callable[[Tensor], Tensor]]):
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.__dict__["run"] = reach(self.child)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def closure(child: nn.Module) -> Callable[[Tensor], Tensor]:
    before = child.forward
    return lambda x: before(x) * 2


def default(child: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x, child=child: child(x) * 2


def reference(child: nn.Module) -> Callable[[Tensor], Tensor]:
    child_ref = weakref.ref(child)
    return lambda x: child_ref()(x)  # pyright: ignore[reportOptionalCall]


REACHES = {
    "an unregistered attribute": lambda child: child,
    "a bound method": lambda child: child.forward,
    "a partial": lambda child: functools.partial(F.linear, weight=child.weight),
    "a closure": closure,
    "a default argument": default,
    "a weak reference": reference,
}


@pytest.mark.parametrize("reach", REACHES)
def test_a_child_reached_otherwise_is_the_replicas_own(reach: str):
    net, x = Patched(REACHES[reach]), torch.randn(3, 2)
    expected = net(x)
    first, second = replicas(net, TWO)
    net.child.weight.data.zero_()
    net.child.bias.data.zero_()
    assert torch.equal(second(x), expected)
    assert torch.equal(first(x), net(x))


@pytest.mark.parametrize("wrap", [list, tuple, lambda layers: {"all": list(layers)}])
def test_a_plain_container_of_layers_holds_the_replicas_layers(wrap):
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net.order = wrap(net.children())
    for replica in replicas(net, TWO):
        order = replica.order["all"] if isinstance(replica.order, dict) else replica.order
        assert [id(layer) for layer in order] == [id(layer) for layer in replica]


def test_a_container_that_holds_itself_is_no_trap():
    net = nn.Linear(2, 2)
    net.ring = []
    net.ring.append(net.ring)
    assert replicas(net, ["cpu"])[0].ring is net.ring


def test_a_record_that_a_hook_keeps_is_shared():
    net = nn.Linear(2, 2)
    calls: list[object] = [net]  # holds a module already
    net.register_forward_hook(lambda module, args, out: calls.append(module))
    for replica in replicas(net, TWO):
        replica(torch.ones(1, 2))
    assert len(calls) == 3


@pytest.mark.parametrize("how", ["torch.compile(module)", "module.compile()"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_forward_runs_with_the_replicas_own_weights(how: str):
    net: Any = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    if how == "module.compile()":
        net.compile(backend="eager")
    else:
        net = torch.compile(net, backend="eager")
    expected = net(x)
    first, second = replicas(net, TWO)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.data.zero_()
    torch.testing.assert_close(second(x), expected)
    assert first(x).count_nonzero() == 0


# --- TorchScript


class ScriptedByClass(torch.jit.ScriptModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    @torch.jit.script_method  # pyright: ignore[reportPrivateImportUsage]
    def forward(self, x):
        return self.net(x)


SCRIPTED = {
    "scripted": lambda: torch.jit.script(norm_net().eval()),
    "traced": lambda: torch.jit.trace(norm_net().eval(), torch.randn(2, 3)),
    "a class": lambda: ScriptedByClass().eval(),
}


@pytest.mark.parametrize("block", SCRIPTED)
@pytest.mark.parametrize("inside", [True, False], ids=["inside Python", "alone"])
def test_a_compiled_block_is_replicated(block: str, inside: bool):
    script = SCRIPTED[block]()
    net, x = (nn.Sequential(nn.Linear(3, 3), script) if inside else script), torch.randn(4, 3)
    expected = net(x)
    first, second = replicas(net, TWO)
    for replica in (first, second):
        torch.testing.assert_close(replica(x), expected)
        assert list(replica.parameters()) == []
    source = tensors_of(net, net)
    ours, theirs = tensors_of(first, net), tensors_of(second, net)
    assert all(same_storage(ours[name], source[name]) for name in source)
    assert not any(same_storage(theirs[name], source[name]) for name in source)
    assert not any(theirs[name].is_leaf for name, _ in net.named_parameters())


@pytest.mark.parametrize("block", SCRIPTED)
def test_gradients_flow_back_through_a_compiled_block(block: str):
    net, x = SCRIPTED[block](), torch.randn(4, 3)
    (2 * net(x).square().sum()).backward()
    expected = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    sum(replica(x).square().sum() for replica in replicas(net, TWO)).backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_a_python_module_inside_a_script_module_is_refused():
    class Holder(nn.Module):
        __jit_ignored_attributes__ = ["child"]

        def __init__(self):
            super().__init__()
            self.child = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Sequential(torch.jit.script(Holder()))
    with pytest.raises(RuntimeError, match="Cannot replicate the ScriptModule '0': its child 'child' is the"):
        replicas(net, TWO)


# --- refused


def test_no_devices_is_an_error():
    with pytest.raises(ValueError, match="devices is empty"):
        replicas(nn.Linear(1, 1), [])


@pytest.mark.parametrize("device", ["warp", "meta", "cuda:99", "cuda:-1", -1, 99])
def test_an_unknown_device_is_an_error_that_lists_the_known_ones(device: str | int):
    with pytest.raises(ValueError, match=f"unknown device {device!r}: this process has cpu"):
        replicas(nn.Linear(1, 1), ["cpu", device])


@pytest.mark.parametrize("device", ["cpu", 0, torch.device("cpu")])
def test_a_bare_device_is_an_error(device: object):
    with pytest.raises(TypeError, match="must be a list of devices"):
        replicas(nn.Linear(1, 1), device)


def test_uninitialised_tensors_are_an_error_that_names_every_one():
    net = nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2, device="meta"))
    with pytest.raises(RuntimeError) as caught:
        replicas(net, TWO)
    for name in ["0.weight (lazy)", "0.bias (lazy)", "1.weight (meta)", "1.running_mean (meta)"]:
        assert name in str(caught.value)


@pytest.mark.parametrize("make", [lambda: nn.Linear(1, 1), lambda: torch.jit.script(nn.Linear(1, 1))])
def test_a_replica_of_a_replica_is_refused(make: Callable[[], nn.Module]):
    with pytest.raises(RuntimeError, match="Cannot replicate a replica"):
        replicas(nn.Sequential(*replicas(make(), ["cpu"])), TWO)


# --- beside torch's own, where that runs


@needs_cuda
def test_on_cuda_torchs_replicate_agrees():
    devices = list(range(torch.cuda.device_count()))
    net, x = norm_net().cuda(), torch.randn(4, 3)
    grads = []
    for make in (replicas, nn.parallel.replicate):
        net.zero_grad()
        made = make(net, devices)
        outputs = [r(x.to(f"cuda:{i}")) for i, r in enumerate(made)]
        sum(out.square().sum().to("cuda:0") for out in outputs).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        assert same_storage(made[0][0].weight, net[0].weight)
        assert same_storage(made[0][1].running_mean, net[1].running_mean)
        assert [r[0].weight.device.index for r in made] == devices
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cuda
def test_from_cpu_to_cuda_sparse_gradients_come_home():
    net = nn.Embedding(4, 2, sparse=True)
    (replica,) = replicas(net, ["cuda"])
    assert not same_storage(replica.weight, net.weight) and replica.weight.device == torch.device("cuda:0")
    replica(torch.tensor([1], device="cuda")).sum().backward()
    assert net.weight.grad.layout == torch.sparse_coo and net.weight.grad.device.type == "cpu"
