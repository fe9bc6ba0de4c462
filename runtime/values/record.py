"""Records what is done to tensors on meta, so that it can be done for real later, to one of them at a time.

While it records, every new tensor is on meta. What needs a value at once (`item`, a shape that depends on values,
a write into a real tensor) is computed at once, from what was recorded before. Random calls are not made: each
notes the state that its generator would have, and the generator is set to a mark by which the next finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardc.compiler.errors import ShardingError
from shardc.compiler.rules import facts
from shardc.compiler.user_code import call_site, is_users
from shardc.runtime.values.recipe import Recipe, Step, generator_of, unreplayable
from shardc.runtime.values.replay import Replay

EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted"}
PURE = {  # in place, whatever was there before
    *("fill_", "zero_", "copy_", "uniform_", "normal_", "log_normal_", "exponential_", "cauchy_"),
    *("geometric_", "random_", "bernoulli_"),
}
RESIZE = {"resize_", "resize_as_", "_resize_output_", "resize"}
IS_META, DEVICE = Tensor.is_meta.__get__, Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
FIRST_MARK = 0x5A4D_0000_0000  # seeds that nobody uses, so that a state tells the step it comes after


@contextmanager
def recording(
    recipe: Recipe, protected: Mapping[int, str] = MappingProxyType({}), told: bool = False
) -> Iterator[None]:
    """Record into a recipe. Afterwards the default generators are as they were before; where they would be had the
    calls been made stands in `recipe.ends`. protected: real storages that must not be written to, and their names.
    told: tensors that wait for their values say that they are on meta to who is neither this package nor torch.
    """
    both = list(dict.fromkeys([torch.default_generator, generator_of(recipe.device)]))
    states = [g.get_state() for g in both]
    recorder = _Recorder(recipe, protected)
    try:
        with _Values(recorder, told), recorder:
            yield
        recipe.ends = [(g, recorder.state(g)) for g in both]
    finally:
        for g, state in zip(both, states, strict=True):
            g.set_state(state)


class _Values(TorchFunctionMode):
    """Makes recorded tensors look real: where they are, and methods that give values to Python without an operator.

    Code asks a tensor whether it is on meta and then does nothing (torch.nn.init does): it would not in a real build.
    told: the user's own init function is told the truth of what waits for it, as it asks to know what it is to fill.
    """

    def __init__(self, recorder: _Recorder, told: bool) -> None:
        super().__init__()
        self._recorder, self._told = recorder, told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, recipe = getattr(func, "__name__", ""), self._recorder.recipe
        if name == "__get__" and isinstance(args[0], Tensor) and args[0].is_meta:
            if self._told and recipe.waits(args[0]) and is_users(sys._getframe(1).f_code.co_filename):
                return func(*args)
            if func == IS_META:
                return False
            if func == DEVICE:
                return recipe.storages[recipe.ref(args[0]).storage].device
        if name in ("tolist", "numpy", "__array__") and recipe.knows(args[0]):
            with self._recorder.paused():
                real = Replay(recipe).value(recipe.ref(args[0]))
                found = func(real, *args[1:], **(kwargs or {}))
            if name != "tolist":
                found.flags.writeable = False  # it shares nothing with the tensor: a write would be lost
            return found
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, recipe: Recipe, protected: Mapping[int, str]) -> None:
        super().__init__()
        self.recipe, self._protected = recipe, protected
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is called here is made for real."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._paused:
            return func(*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = _written(func, args, kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if any(not x.is_meta for x in written) or (tensors and not any(x.is_meta for x in tensors)):
            return self._now(func, args, kwargs, random)
        try:
            out = func(*pytree.tree_map_only(Tensor, _on_meta, args), **_elsewhere(func, kwargs))
        except Exception as error:
            if not written:
                return self._now(func, args, kwargs, random)
            if isinstance(error, NotImplementedError):
                raise unreplayable(func, "it has no kernel for tensors on meta") from error
            raise
        self._keep(func, args, kwargs, out, written, random)
        return out

    def _now(self, func: Any, args: Any, kwargs: dict[str, Any], random: bool) -> Any:
        """The call made for real, on the values that recorded operands have here."""
        real = Replay(self.recipe)
        for x in _written(func, args, kwargs):
            if x.is_meta:
                raise unreplayable(func, "it writes into a real tensor and a recorded one")
            name = self._protected.get(x.untyped_storage()._cdata)
            if name is not None:
                raise ShardingError(
                    f"init writes to {name}, which has its values already", where=call_site(),
                    help="let the init of each module fill the module's own tensors",
                )  # fmt: skip

        def value(x: Tensor) -> Tensor:
            return real.value(self.recipe.ref(x)) if x.is_meta else x

        args, kwargs = pytree.tree_map_only(Tensor, value, (args, kwargs))
        if random:
            generator = self._generator(args, kwargs, func)
            generator.set_state(real.state(self.state(generator)))
        return func(*args, **kwargs)

    def _keep(self, func: Any, args: Any, kwargs: Any, out: Any, written: list[Tensor], random: bool) -> None:
        recipe, name = self.recipe, func._schema.name.split("::")[1]
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.layout != torch.strided or x.is_conj() or x.is_neg() for x in results):
            raise unreplayable(func, "its result is no plain strided tensor")
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "set_" and len(tensors) > 1 and all(recipe.knows(x) for x in tensors[1:]):
            return  # the tensor now lies in another recorded storage, where it will be found
        if name in RESIZE or name == "set_":
            raise unreplayable(func, "it gives a tensor another storage or size")
        fresh = [x for x in results if not recipe.knows(x)]
        writes = tuple(recipe.ref(x) for x in written)
        device = self._device(args, kwargs)
        sizes = [(x, recipe.storages[w.storage].nbytes) for x, w in zip(written, writes, strict=True)]
        if any(x.untyped_storage().nbytes() != nbytes for x, nbytes in sizes):
            raise unreplayable(func, "it gives a tensor another storage or size")
        given_args, given_kwargs = pytree.tree_map_only(Tensor, self._given, (args, kwargs))
        refs = tuple(recipe.ref(x, device) for x in results)
        if name in EMPTY or not (fresh or writes):
            return  # a new storage, or a view of one: no values yet
        makes = tuple(dict.fromkeys(recipe.ref(x).storage for x in fresh))
        before = self.state(self._generator(args, kwargs, func)) if random else None
        pure = name in PURE or all(a.kwarg_only for a, _ in facts.written(func, args, kwargs))
        pure = bool(writes) and pure
        recipe.add(Step(func, given_args, given_kwargs, refs, makes, writes, pure, before, call_site()))
        if random:
            self._mark(self._generator(args, kwargs, func))

    def _given(self, x: Tensor) -> Any:
        return self.recipe.ref(x) if x.is_meta else x.detach().clone()

    def _device(self, args: Any, kwargs: dict[str, Any]) -> torch.device:
        """Where the call would be made."""
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "meta":
            return torch.device(device)
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                return self.recipe.storages[self.recipe.ref(x).storage].device if x.is_meta else x.device
        return self.recipe.device

    def _generator(self, args: Any, kwargs: dict[str, Any], func: Callable[..., Any]) -> torch.Generator:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Generator)]
        return given[0] if given else generator_of(self._device(args, kwargs))

    def state(self, generator: torch.Generator) -> int:
        """What a generator would draw from here: its state after a recorded step, or one that it was set to."""
        state = generator.get_state()
        key = state.numpy().tobytes()
        if key not in self.recipe.marks:
            self.recipe.starts.append(state)
            self.recipe.marks[key] = -len(self.recipe.starts)
        return self.recipe.marks[key]

    def _mark(self, generator: torch.Generator) -> None:
        step = len(self.recipe.steps) - 1
        generator.manual_seed(FIRST_MARK + step)
        self.recipe.marks[generator.get_state().numpy().tobytes()] = step


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes."""
    leaves = pytree.tree_leaves([value for _, value in facts.written(func, args, kwargs)])
    return [x for x in leaves if isinstance(x, Tensor)]


def _on_meta(x: Tensor) -> Tensor:
    if x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _elsewhere(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's keywords with meta in place of its device."""
    moved = pytree.tree_map_only(Tensor, _on_meta, kwargs)
    if any(a.name == "device" for a in func._schema.arguments):
        moved |= {"device": torch.device("meta")}
        moved.pop("pin_memory", None)
    return moved
