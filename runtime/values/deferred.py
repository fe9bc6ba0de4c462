"""Modules whose tensors are on meta, and how they come to their values: as they were built, or by init functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardc.compiler.errors import PlanError
from shardc.compiler.user_code import call_site
from shardc.runtime.values.recipe import Recipe
from shardc.runtime.values.record import recording

PLACE = "_shardc_recipe"  # among a module's attributes, so that a copy of the module asks for a copy of the recipe


def deferred_init(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a module without allocating its tensors: they are on meta, and compile makes this rank's shards of them.

    build: a module class or a function, called with the arguments. The values will be, bit for bit, those of
    `build(*args, **kwargs)` called here, from the state that the generators have here, which is left as it is.
    Modules among the arguments keep their values, and may be written to.

    Raises ShardingError, with the operator and its line, for what cannot be recorded, and TypeError where no module
    is built.
    """
    recipe = Recipe()
    with recording(recipe):
        module = build(*args, **kwargs)
    if not isinstance(module, nn.Module):
        raise TypeError(f"deferred_init takes what builds an nn.Module, and was given a {type(module).__name__}")
    for name, x in tensors(module).items():
        if recipe.knows(x):
            recipe.names[name] = x._version
            kind = _WaitingParameter if isinstance(x, nn.Parameter) else _WaitingTensor
            x.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]
            vars(x)["_fqn"] = name
    module.__dict__[PLACE] = recipe
    return module


class _WaitingTensor(Tensor):
    """A tensor of a deferred module. Other writes raise its version; those through `.data` would leave no trace."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.data:
            raise _changed(getattr(args[0], "_fqn", "a tensor"))
        return Tensor.__torch_function__(func, (), args, kwargs or {})  # its results are plain tensors


class _WaitingParameter(_WaitingTensor, nn.Parameter):
    """A parameter of a deferred module."""


def _changed(fqn: str) -> PlanError:
    return PlanError(
        f"{fqn} was changed after deferred_init, where it has no values yet",
        where=call_site(),
        help="do it inside: deferred_init takes any function that builds the module",
    )


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by FQN, tied ones under every name."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return dict(named)


def recipes(model: nn.Module) -> list[Recipe]:
    """Those of a model and of its submodules. Raises PlanError where a module was changed after deferred_init."""
    found = []
    for prefix, module in model.named_modules():
        recipe = module.__dict__.get(PLACE)
        if recipe is None:
            continue
        found.append(recipe)
        held = tensors(module)
        for name, version in recipe.names.items():
            x = held.get(name)
            if x is not None and x.is_meta and (not recipe.knows(x) or x._version != version):
                raise _changed(f"{prefix}.{name}" if prefix else name)
    return found


def drop_recipes(model: nn.Module) -> None:
    """Forget how a model was built, once it has its values."""
    for module in model.modules():
        module.__dict__.pop(PLACE, None)


def owners(model: nn.Module, known: Sequence[Recipe]) -> dict[str, list[str]]:
    """Module FQN -> names of its own tensors that are on meta and in no recipe, in `modules()` order."""
    found = {}
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        names = [n for n, x in own.items() if x is not None and x.is_meta and not any(r.knows(x) for r in known)]
        if names:
            found[prefix] = names
    return found


def check_fillable(model: nn.Module, owned: dict[str, list[str]]) -> None:
    """Raises PlanError that lists what is on meta in modules that have no `reset_parameters`."""
    missing = [
        f"{prefix}.{name}" if prefix else name
        for prefix, names in owned.items()
        if not callable(getattr(model.get_submodule(prefix), "reset_parameters", None))
        for name in names
    ]
    if missing:
        raise PlanError(
            f"on meta, in modules without reset_parameters: {', '.join(missing)}",
            help="give compile an init: a function of each such module, a state_dict or a path, or a pair of them "
            "(path, function) where a file lacks some; or use deferred_init",
        )


def record_init(model: nn.Module, owned: dict[str, list[str]], init: Any, device: torch.device) -> Recipe:
    """What `init`, or `reset_parameters` where it is None, does to each of these modules.

    What is real stays as it is. A tensor of several modules: where `init` is None it gets what its first module gives
    it, as in `later.weight = earlier.weight`; a function of the user's is called for all of them, and the last wins.
    """
    recipe = Recipe(device)
    protected = {x.untyped_storage()._cdata: name for name, x in tensors(model).items() if not x.is_meta}
    for prefix, names in owned.items():
        module = model.get_submodule(prefix)
        for x in ({**module._parameters, **module._buffers}[name] for name in names):
            recipe.waiting.add(recipe.ref(x).storage)
    real = {id(x) for x in tensors(model).values() if not x.is_meta}
    filled: set[int] = set()
    with recording(recipe, protected, told=init is not None):
        for prefix in owned:
            module = model.get_submodule(prefix)
            with _standing_in(module, real | filled if init is None else real):
                if init is None:
                    module.reset_parameters()  # pyright: ignore[reportCallIssue]
                else:
                    init(module)
            filled |= {id(x) for x in module._parameters.values() if x is not None}
    return recipe


@contextmanager
def _standing_in(module: nn.Module, keep: set[int]) -> Iterator[None]:
    """While a module is initialised, others in place of those of its own tensors that must keep their values."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    for table in (module._parameters, module._buffers):
        for name, x in table.items():
            if x is not None and id(x) in keep:
                kept.append((table, name, x))
    for table, name, x in kept:
        table[name] = _stand_in(x)
    try:
        yield
    finally:
        for table, name, x in kept:
            table[name] = x


def _stand_in(x: Tensor) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return nn.Parameter(made, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else made
