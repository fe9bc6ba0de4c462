"""Replicas of a module on the devices of this process, and one call spread over them.

    replica 0 on the source's device    its parameters and buffers are the source's memory
    every other replica                 memory of its own, code objects shared

A replica's parameters are ordinary attributes computed from the source's parameters (not leaves, and not in
`parameters()`), so backward through any replica adds to the source's gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shardc.runtime.replicas.devices import Device, copied, local_devices
from shardc.runtime.replicas.replicable import refuse_elsewhere, refuse_unfit
from shardc.runtime.replicas.repoint import Repoint, Twins
from shardc.runtime.replicas.scatter import gather, scatter
from shardc.runtime.workers import run_on_devices

M = TypeVar("M", bound=nn.Module)

# The dicts and sets in which any module keeps its parts and hooks. A replica gets its own, so that
# registering on a replica does not reach the source.
_OWN_CONTAINERS = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)}


def replicas(module: M, devices: Iterable[Device], *, detach: bool = False) -> list[M]:
    """One replica of the module per device; the same device may be named several times.

    Gradients flow back to the module through parameters, and through buffers that require grad, unless
    `detach`. Replica 0 shares storage with the module for what lies on the first device already.
    Raises ValueError for an empty list or an unknown device, RuntimeError for a module that cannot be
    replicated: uninitialised (lazy or meta) tensors, a Python module inside a ScriptModule, a replica.
    """
    places = local_devices(devices)
    refuse_unfit(module)
    return _replicas(module, places, detach)


def data_parallel(
    module: nn.Module,
    inputs: Any,
    devices: Iterable[Device],
    *,
    module_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The module's output for the inputs, whose rows are split over replicas on the devices, one thread each.

    `inputs` is the argument list if it is a tuple, otherwise the one argument (a tensor, a list, a dict);
    `module_kwargs` are keyword arguments. Tensors in them are split along dim 0 as `torch.chunk` does, so
    fewer rows than devices use fewer devices; 0-d tensors and other values go to every replica.
    Outputs are joined along dim 0 on the first device, 0-d outputs to a vector. One device: the module itself
    runs, and its output is returned as it is.

    The module must lie on the first device (else RuntimeError): its buffers see that replica's updates.
    An exception in a replica is raised here with its type, the replica's number and its traceback as text.
    """
    places = local_devices(devices)
    refuse_unfit(module)
    refuse_elsewhere(module, places[0])
    positional = inputs if isinstance(inputs, tuple) else () if inputs is None else (inputs,)
    keywords = dict(module_kwargs or {})
    if not positional and not keywords:
        places = places[:1]  # nothing to split: every replica would compute the same
    if len(places) == 1:
        run = partial(_call, module, *scatter((positional, keywords), places)[0])
        return run_on_devices([run], places)[0]
    shares = scatter((positional, keywords), places)
    used = places[: len(shares)]
    copies = _replicas(module, used, detach=False)
    calls: list[Callable[[], Any]] = [partial(_call, one, *share) for one, share in zip(copies, shares, strict=True)]
    return gather(run_on_devices(calls, used), places[0])


def _call(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return module(*positional, **keywords)


def _replicas(module: M, places: list[torch.device], detach: bool) -> list[M]:
    modules = list(_tree(module, set()))
    return [_replica(module, modules, place, i == 0, detach) for i, place in enumerate(places)]


def _tree(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    # Not modules(): there a traced module, or a ScriptModule written as a class, names another than itself.
    if id(module) in seen:
        return
    seen.add(id(module))
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _tree(child, seen)


def _replica(module: M, modules: list[nn.Module], place: torch.device, share: bool, detach: bool) -> M:
    twins: Twins = {}
    held = [
        tensor
        for one in modules
        for tensor in chain(one._parameters.values(), one._buffers.values())
        if tensor is not None
    ]  # held to the end: a ScriptModule may make a tensor's Python object anew, with a new id, at each look
    for tensor in held:
        if id(tensor) not in twins:
            twins[id(tensor)] = _twin_tensor(tensor, place, share, detach)
    for one in modules:
        twins[id(one)] = _blank(one)
    repoint = Repoint(twins)
    for one in modules:
        if isinstance(one, torch.jit.ScriptModule):
            _fill_script(twins[id(one)], one, twins)
        else:
            vars(twins[id(one)]).update(_state(one, repoint))
    return twins[id(module)]


def _twin_tensor(tensor: Tensor, place: torch.device, share: bool, detach: bool) -> Tensor:
    tracked = tensor.requires_grad and not detach and torch.is_grad_enabled()
    source = tensor if tracked else tensor.detach()
    if not (share and tensor.device == place):
        return copied(source, place)
    # alias and no view: its gradient may be sparse
    return torch.ops.aten.alias.default(source) if tracked else source


def _blank(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        # A new object over the same compiled code. copy.copy would miss the method on a traced module, or on
        # one written as a class, and return a second name for the source.
        return module.__copy__()
    # Not type(module).__new__: a GraphModule would make a new class, and with it new code, per replica.
    return object.__new__(type(module))


def _state(module: nn.Module, repoint: Repoint) -> dict[str, Any]:
    state = {
        name: _own(value, repoint) if name in _OWN_CONTAINERS else repoint(value)
        for name, value in vars(module).items()
    }
    state["_is_replica"] = True  # torch's own mark: zero_grad() on a replica warns that it has no effect
    parameters = state["_parameters"]
    state["_parameters"] = {name: None for name, value in parameters.items() if value is None}
    state.update((name, value) for name, value in parameters.items() if value is not None)
    return state


def _own(container: Any, repoint: Repoint) -> Any:
    repointed = repoint(container) if container else container
    return repointed.copy() if repointed is container else repointed


def _fill_script(blank: nn.Module, module: nn.Module, twins: Twins) -> None:
    # The slots of compiled code are typed: a parameter's twin must stay in the parameter's slot.
    for name, part in chain(module._parameters.items(), module._buffers.items(), module._modules.items()):
        if part is not None:
            setattr(blank, name, twins[id(part)])
    # That slot is still read as an attribute; only the listing must not show it.
    vars(blank).update(_parameters={}, _is_replica=True)
