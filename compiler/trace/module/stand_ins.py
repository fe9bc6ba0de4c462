"""What tracing does to the user's module while it runs, and undoes: stand-in tensors and border hooks.

The module may hold what cannot be traced (shards, meta tensors), so each parameter and buffer is
swapped for a fake one of its global shape. Afterwards every module is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.marks import border_key, mark
from shardc.compiler.ir.signature import TensorInfo
from shardc.compiler.trace.sources import sparse
from shardc.compiler.trace.torch_internals import FakeTensorMode

TABLES = ("_parameters", "_buffers")


@dataclass(frozen=True)
class Place:
    """One entry of a module's table of parameters or buffers."""

    module: nn.Module
    table: str
    name: str

    def get(self) -> Tensor | None:
        table = getattr(self.module, self.table)
        return table[self.name] if self.name in table else None

    def put(self, tensor: Tensor) -> None:
        # A table of a scripted module is made anew on each access and writes through.
        getattr(self.module, self.table)[self.name] = tensor


@dataclass(frozen=True)
class Held:
    """A parameter or buffer: its FQN, the further FQNs it is tied under, and every place that holds it."""

    fqn: str
    aliases: tuple[str, ...]
    places: tuple[Place, ...]
    parameter: bool
    tensor: Tensor
    info: TensorInfo

    def put(self, tensor: Tensor) -> None:
        for place in self.places:
            place.put(tensor)


def held_tensors(module: nn.Module, given: Mapping[str, TensorInfo] | None) -> list[Held]:
    """The module's parameters, then its buffers, each once, in `named_parameters` order."""
    fqns: dict[int, list[str]] = {}
    places: dict[int, dict[Place, None]] = {}
    tensors: dict[int, Tensor] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for table in TABLES:
            for name, tensor in getattr(owner, table).items():
                if tensor is not None:
                    tensors[id(tensor)] = tensor
                    fqns.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
                    places.setdefault(id(tensor), {})[Place(owner, table, name)] = None
    unknown = sorted(set(given or {}) - {fqn for names in fqns.values() for fqn in names})
    if unknown:
        raise ShardingError(f"no parameter or buffer is called {unknown[0]}", help="name one of the module's own")
    held = [_held(tensors[key], fqns[key], tuple(places[key]), given or {}) for key in tensors]
    return [h for h in held if h.parameter] + [h for h in held if not h.parameter]


def _held(tensor: Tensor, fqns: list[str], places: tuple[Place, ...], given: Mapping[str, TensorInfo]) -> Held:
    if is_lazy(tensor):
        raise ShardingError(
            f"{fqns[0]} has no shape yet",
            help="run the lazy module on one batch before compiling it",
        )
    if tensor.layout is not torch.strided:
        raise sparse(f"{fqns[0]} is", tensor.layout)
    info = next((given[fqn] for fqn in fqns if fqn in given), None) or TensorInfo.of(tensor)
    parameter = any(place.table == "_parameters" for place in places)
    return Held(fqns[0], tuple(fqns[1:]), places, parameter, tensor, info)


def trace_device(infos: Sequence[TensorInfo]) -> torch.device:
    """The device that stands for meta: that of the first tensor elsewhere."""
    devices = [info.device for info in infos if info.device.type != "meta"]
    for device in devices:
        # Autograd ends the process, or fails obscurely, for a kind of device that is not there.
        if device.type != "cpu" and not torch.get_device_module(device).is_available():
            raise ShardingError(f"a tensor is on {device}, and there is no such device here")
    return next(iter(devices), torch.device("cpu"))


def stand_in(info: TensorInfo, mode: FakeTensorMode, device: torch.device, like: Tensor) -> Tensor:
    """A fake tensor of the given shape on a real device; a Parameter where `like` is one."""
    if info.device.type != "meta":
        device = info.device
    with mode, torch.inference_mode(False), torch.no_grad():
        fake = torch.empty_strided(info.shape, _dense_stride(info), dtype=info.dtype, device=device)
    if not isinstance(like, nn.Parameter):
        return fake.requires_grad_(info.requires_grad)
    parameter = nn.Parameter(fake, requires_grad=info.requires_grad)
    if type(like) is nn.Parameter:
        vars(parameter).update(vars(like))  # forward may look at what the user attached to it
    return parameter


def _dense_stride(info: TensorInfo) -> tuple[int, ...]:
    """The strides, or contiguous ones for a slice or an expanded tensor: the program is given it dense."""
    order = sorted(range(len(info.shape)), key=lambda d: (info.stride[d], info.shape[d]))
    size = 1
    for d in order:
        if info.shape[d] != 1 and info.stride[d] != size:
            return _contiguous_stride(info.shape)
        size *= info.shape[d]
    return info.stride if size else _contiguous_stride(info.shape)


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride, size = [], 1
    for length in reversed(shape):
        stride.append(size)
        size *= max(length, 1)
    return tuple(reversed(stride))


@contextmanager
def standing_in(
    module: nn.Module, held: Sequence[Held], fakes: Sequence[Tensor], mode: FakeTensorMode, device: torch.device
) -> Iterator[None]:
    """The module computes with `fakes` in place of its own tensors.

    Plain attributes on meta get one too, put back by `Attributes`: met as a constant it is refused by name.
    """
    try:
        for h, fake in zip(held, fakes, strict=True):
            h.put(fake)
        for fqn, owner in module.named_modules():
            for name, value in list(vars(owner).items()):
                if isinstance(value, Tensor) and value.layout is not torch.strided:
                    full = f"{fqn}.{name}" if fqn else name
                    raise sparse(f"{full} is", value.layout)
                if isinstance(value, Tensor) and value.is_meta:
                    vars(owner)[name] = stand_in(TensorInfo.of(value), mode, device, value)
        yield
    finally:
        for h in held:
            h.put(h.tensor)


@contextmanager
def bordered(module: nn.Module, fqns: Sequence[str]) -> Iterator[None]:
    """Every tensor that enters or leaves one of the modules passes through a mark with its key."""
    with ExitStack() as stack:
        for fqn in dict.fromkeys(fqns):
            try:
                owner = module.get_submodule(fqn)
            except AttributeError:
                raise ShardingError(f"there is no module {fqn!r} to mark") from None
            if isinstance(owner, torch.jit.ScriptModule):
                raise ShardingError(
                    f"{fqn!r} is a scripted module, whose border cannot be marked",
                    help="put it in a Python module and name that one",
                )
            before, after = _hooks(fqn)
            stack.callback(owner.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(owner.register_forward_hook(after).remove)
        yield


def _hooks(fqn: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Hooks of few lines where tensors come and go one by one: Dynamo follows each line at every call."""
    first, result = border_key(fqn, "in", "0"), border_key(fqn, "out", "")

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return (mark(args[0], first),), kwargs
        marked = [_mark_tree(arg, fqn, "in", str(i)) for i, arg in enumerate(args)]
        return tuple(marked), {name: _mark_tree(arg, fqn, "in", f"kw:{name}") for name, arg in kwargs.items()}

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return mark(output, result) if isinstance(output, Tensor) else _mark_tree(output, fqn, "out", "")

    return before, after


def _mark_tree(tree: Any, fqn: str, side: str, prefix: str) -> Any:
    if isinstance(tree, Tensor):
        return mark(tree, border_key(fqn, side, prefix))
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree

    def visit(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        where = pytree.keystr(path)
        if path and not prefix and isinstance(path[0], pytree.SequenceKey):
            where = f"{path[0].idx}{pytree.keystr(path[1:])}"
        return mark(value, border_key(fqn, side, prefix + where))

    return pytree.tree_map_with_path(visit, tree)
