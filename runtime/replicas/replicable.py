"""Which modules can be replicated, and the error that says why another one cannot."""

from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def refuse_unfit(module: nn.Module) -> None:
    """Raises RuntimeError for a module that has no right copy."""
    _refuse_python_inside_script(module)
    _refuse_uninitialised(module)
    _refuse_replica(module)


def _refuse_python_inside_script(module: nn.Module) -> None:
    for name, script in module.named_modules():
        if not isinstance(script, torch.jit.ScriptModule):
            continue
        for child_name, child in script.named_modules():
            if not isinstance(child, torch.jit.ScriptModule):
                raise RuntimeError(
                    f"Cannot replicate the ScriptModule {name or type(module).__name__!r}: its child "
                    f"{child_name!r} is the Python module {type(child).__name__}, and compiled code cannot "
                    "be pointed at a copy of a Python module. Script the child too, or leave its parent in "
                    "Python."
                )


def _refuse_uninitialised(module: nn.Module) -> None:
    bare = [
        f"{path}.{name} ({'lazy' if is_lazy(tensor) else 'meta'})".removeprefix(".")
        for path, one in module.named_modules()
        for name, tensor in chain(one._parameters.items(), one._buffers.items())
        if tensor is not None and (is_lazy(tensor) or tensor.is_meta)
    ]
    if bare:
        raise RuntimeError(
            f"Cannot replicate a module with uninitialised tensors: {', '.join(bare)}. Give them values "
            "first: a lazy module gets them from one forward pass, a meta module from to_empty() and an init."
        )


def _refuse_replica(module: nn.Module) -> None:
    if any("_is_replica" in vars(one) for one in module.modules()):
        raise RuntimeError(
            "Cannot replicate a replica: its parameters are not registered, so copies would share them. "
            "Replicate the module that it came from."
        )


def refuse_elsewhere(module: nn.Module, place: torch.device) -> None:
    """Raises RuntimeError if a parameter or buffer lies on another device than the place."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.device != place:
            raise RuntimeError(
                f"the module must be on {place}, the first of the devices, but {name} is on {tensor.device}; "
                f"move it with module.to({str(place)!r})"
            )
