"""A first call in any surroundings: modes, trackers and hooks that watch see no trace, and the program is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import shardc
from shardc import FullyShard, Mesh, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

# What torch says of its own modes.
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection|Error detected in|Full backward hook")


def real(x: Any) -> bool:
    return type(x).__name__ not in ("FakeTensor", "FunctionalTensor")


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert all(map(real, args))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert all(map(real, args))
        return func(*args, **(kwargs or {}))


def packed() -> AbstractContextManager[None]:
    return torch.autograd.graph.saved_tensors_hooks(Tensor.numpy, torch.from_numpy)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "communication debugging": CommDebugMode,
    "counting of operations": lambda: FlopCounterMode(display=False),
    "device": lambda: torch.device("cpu"),
    "dispatch mode": Operators,
    "function mode": Functions,
    "packed tensors": packed,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


class Net(nn.Module):
    """As Dynamo reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def inner(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))


class Run(Net):
    """As it runs."""

    @torch.compiler.disable
    def inner(self, x: Tensor) -> Tensor:
        return super().inner(x)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    out = module(x)
    out.float().square().mean().backward()
    found = [p.grad for p in module.parameters()]
    return [out.detach(), *(getattr(g, "full_tensor", lambda g=g: g)() for g in found if g is not None)]


def agree(plan: Any, mesh: Any, part: slice, name: str, kind: type[Net] = Net) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 4), kind()
    alone, compiled = deepcopy(model), shardc.compile(model, plan, mesh=mesh)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if name == "autocast" else {}
    with SURROUNDINGS[name]():
        want = gradients(alone, x)
    want[0] = want[0][part]
    for _ in range(2):
        with SURROUNDINGS[name]():
            have = gradients(compiled, x[part])
        torch.testing.assert_close(have, want, **tolerance)


@pytest.mark.parametrize("kind", [Net, Run])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_first_call_in_any_surroundings(name: str, kind: type[Net]):
    agree(FullyShard(), Mesh(dp=2), slice(None), name, kind)


def first_calls(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for plan in (FullyShard(), Replicated()):
        for name in SURROUNDINGS:
            agree(plan, mesh, slice(2 * rank, 2 * rank + 2), name)
    compiled = shardc.compile(Net(), FullyShard(), mesh=mesh)
    x = torch.full((2, 4), float("nan") if rank else 1.0)
    with pytest.raises(RuntimeError, match="returned nan values"), torch.autograd.set_detect_anomaly(True):
        compiled(x).sum().backward()
    return "done"


@on_ranks
def test_a_first_call_in_any_surroundings_on_ranks_and_a_nan_is_found_by_all():
    assert run_ranks(first_calls, 2) == ["done", "done"]


@contextmanager
def hooked(hook: Any) -> Iterator[None]:
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_the_users_hooks_of_every_module_are_in_the_program_as_long_as_they_are_set():
    model, x = Net(), torch.randn(4, 4)
    compiled = shardc.compile(deepcopy(model), Replicated(), mesh=Mesh(dp=2))
    for factor in (2, 3):
        with hooked(lambda module, args, out, factor=factor: out * factor if isinstance(module, nn.Linear) else None):
            torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    made = len(compiled.programs)
    with FlopCounterMode(display=False):
        compiled(x)
    assert len(compiled.programs) == made
