"""What tracing does to the user's module while it runs, and undoes: stand-in tensors, border hooks, attributes.

The module may hold what cannot be traced (shards, meta tensors), so each parameter and buffer is
swapped for a fake one of its global shape. Afterwards every module is as it was, attributes
that forward itself had set included; which those are is reported, as the traced program will not set them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from shardc.compiler.errors import ShardingError
from shardc.compiler.marks import border_key, mark
from shardc.compiler.signature import TensorInfo

TABLES = ("_parameters", "_buffers")
# RNNs keep a list of their own weights, rebuilt whenever it is out of date.
DERIVED = ("_flat_weights", "_flat_weight_refs")
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


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
        for owner in module.modules():
            for name, value in list(vars(owner).items()):
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
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        marked = tuple(_mark_tree(arg, fqn, "in", str(i)) for i, arg in enumerate(args))
        return marked, {name: _mark_tree(arg, fqn, "in", f"kw:{name}") for name, arg in kwargs.items()}

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return _mark_tree(output, fqn, "out", "")

    return before, after


def _mark_tree(tree: Any, fqn: str, side: str, prefix: str) -> Any:
    def visit(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        where = pytree.keystr(path)
        if path and not prefix and isinstance(path[0], pytree.SequenceKey):
            where = f"{path[0].idx}{pytree.keystr(path[1:])}"
        return mark(value, border_key(fqn, side, prefix + where))

    return pytree.tree_map_with_path(visit, tree)


class Attributes:
    """The attributes of all submodules, to see what forward changed and to put it back."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.named_modules())
        self._before = [_copied(vars(owner)) for _, owner in self._modules]

    def changed(self) -> list[str]:
        """FQNs of the attributes that forward set, parameters and buffers apart."""
        out = []
        for (fqn, owner), before in zip(self._modules, self._before, strict=True):
            now = vars(owner)
            names = [n for n in now if n not in (*TABLES, *DERIVED) and not _same(before.get(n), now[n])]
            for table in TABLES:
                if isinstance(now.get(table), dict):
                    names += [n for n in now[table] if n not in before[table][1]]
            out += [f"{fqn}.{n}" if fqn else n for n in names if not _recomputed(owner, n)]
        return out

    def restore(self) -> None:
        for (_, owner), before in zip(self._modules, self._before, strict=True):
            for name in [name for name in vars(owner) if name not in before]:
                del vars(owner)[name]
            for name, (value, content) in before.items():
                vars(owner)[name] = value
                if content is not None and not _alike(value, content):
                    _refill(value, content)


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a shallow copy of it, where it is a container that forward could fill."""
    return {n: (v, v.copy() if isinstance(v, (list, dict, set)) else None) for n, v in attributes.items()}


def _same(before: tuple[Any, Any] | None, value: Any) -> bool:
    if before is None:
        return False
    old, content = before
    if old is not value:
        return isinstance(value, PLAIN) and type(old) is type(value) and old == value
    return content is None or _alike(value, content)


def _alike(container: Any, content: Any) -> bool:
    """Whether a container still holds the same objects in the same order."""
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return {id(v) for v in container} == {id(v) for v in content}
    if isinstance(container, dict):
        return all(a is b and container[a] is content[b] for a, b in zip(container, content, strict=True))
    return all(a is b for a, b in zip(container, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _recomputed(owner: nn.Module, name: str) -> bool:
    """Whether a pre-hook sets it on each call from a parameter (weight_norm, spectral_norm, prune)."""
    return any(f"{name}{suffix}" in owner._parameters for suffix in ("_g", "_orig"))
