"""`backend=`: what is computed between collectives goes through torch.compile, and comes out the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Plan
from shardc.compiler.ir.views import Kind
from shardc.runtime.run.compiled_stretches import Stretches, _Compiled
from tests.runtime.ranks import on_ranks, run_ranks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer())


def plan() -> Plan:
    return Plan(dp=FullyShard("*"), tp={"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})


def trained(model: nn.Module, rows: tuple[int, ...], device_mesh) -> list[Tensor]:
    """Outputs and whole gradients over calls of several sizes, the first again at the end."""
    found = []
    for n in rows:
        model.zero_grad()
        x = torch.arange(8.0 * n).view(n, 8).cos()
        out = model(x)
        out.square().sum().backward()
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
        found += [out.detach(), *grads]
    return found


def compared(rank: int, backend: str | Callable, rows: tuple[int, ...]) -> int:
    mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()), mesh_dim_names=("dp", "tp"))
    calls: list[int] = []

    def counting(gm, inputs):
        calls.append(len(list(gm.graph.nodes)))
        return gm.forward

    eager = trained(shardc.compile(net(), plan(), mesh=mesh), rows, mesh)
    other = shardc.compile(net(), plan(), mesh=mesh, backend=counting if backend == "counting" else backend)
    for have, want in zip(trained(other, rows, mesh), eager, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    return len(calls)


@on_ranks
def test_any_backend_of_torch_compile_gets_the_stretches_between_collectives():
    assert run_ranks(compared, 2, ("counting", (4, 6, 4)))[0] > 4


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 13), nn.Linear(13, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return x + torch.linalg.inv(y.T @ y + torch.eye(8)).sum(0)


def compiled_when(rank: int, inverts: bool) -> tuple[int, int]:
    """How many stretches are compiled once the program is there, and after a step."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    compiled: list[str] = []

    def backend(gm, inputs):
        compiled.append(gm.code)
        return gm.forward

    torch.manual_seed(0)
    model, x = (Uneven() if inverts else Layer()), torch.randn(4, 8)
    want = model(x)
    shards = {"*up": ColwiseParallel(), "*down": RowwiseParallel()}
    made = shardc.compile(model, Plan(tp=shards), mesh=mesh, backend=backend)
    made.lower(x)
    before = len(compiled)
    found = made(x)
    found.sum().backward()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    return before, len(compiled)


@on_ranks
@pytest.mark.parametrize("inverts", [False, True])  # of 13 features each rank has its own number; zeros have no inverse
def test_every_stretch_is_compiled_before_the_first_step(inverts):
    for before, after in run_ranks(compiled_when, 2, (inverts,)):
        assert before == after > 1


CALLS: list[int] = []


@torch.library.custom_op("backend_test::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    CALLS.append(1)
    return x.sin()


counted.register_fake(lambda x: torch.empty_like(x))
shardc.rule(torch.ops.backend_test.counted, "b f -> b f")


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(counted(self.up(x)) * 2)


def calls_of_the_users(rank: int) -> list[int]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    shards = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = Counted().requires_grad_(False)
    made = shardc.compile(model, Plan(tp=shards), mesh=mesh, backend=lambda gm, inputs: gm.forward)
    x, seen = torch.randn(4, 8), []
    CALLS.clear()
    made.lower(x)
    for _ in range(3):
        made(x)
        seen.append(len(CALLS))
    return seen


@on_ranks
def test_an_operator_of_the_users_own_is_called_once_a_step():
    assert run_ranks(calls_of_the_users, 2) == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("shape", "stride"), [((2, 3), (3, 1)), ((3, 2), (1, 3)), ((4, 3), (0, 1)), ((0, 3), (3, 1)), ((), ())]
)
def test_zeros_to_compile_with_lie_in_memory_as_the_values_will(shape: tuple[int, ...], stride: tuple[int, ...]):
    graph = torch.fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.sin.default, (graph.placeholder("x"),)),))
    call, found = _Compiled(torch.fx.GraphModule(nn.Module(), graph), lambda gm, inputs: gm.forward), []
    call._compile = lambda: lambda x: found.append(x)  # pyright: ignore
    call.compile_for([Kind(shape, stride, torch.float64, torch.device("cpu"))])
    (x,) = found
    assert (x.shape, x.stride(), x.dtype) == (shape, stride, torch.float64) and not x.any()
    assert call._made.keys() == {((torch.Size(shape), stride, torch.float64, torch.device("cpu")),)}


def test_ranks_of_a_machine_begin_with_other_stretches(monkeypatch):
    order: list[int] = []
    monkeypatch.setattr(_Compiled, "compile_for", lambda self, kinds: order.append(self.length))
    stretches, kinds = Stretches("eager"), {}
    for length in (3, 5, 4, 6):
        graph = torch.fx.Graph()
        given = value = graph.placeholder("x")
        for _ in range(length - 1):
            value = graph.call_function(torch.relu, (value,))
        kinds[given.name] = Kind((2,), (1,), torch.float32, torch.device("cpu"))
        stretches._calls.append((_Compiled(torch.fx.GraphModule(nn.Module(), graph), "eager"), [given]))
    for rank, want in (("0", [6, 4, 5, 3]), ("1", [5, 3, 6, 4])):
        order.clear()
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        stretches.compile_all(kinds)
        assert order == want


@on_ranks
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_what_eager_gives():
    run_ranks(compared, 1, ("inductor", (4,)))  # collectives over one rank part stretches all the same


@pytest.mark.parametrize("backend", ["", "tvm", None, 3])
def test_another_backend_is_refused(backend):
    with pytest.raises(shardc.PlanError, match="backend"):
        shardc.compile(net(), plan(), mesh=shardc.Mesh(dp=1, tp=2), backend=backend)
