"""What a program says it holds at once, beside the memory that a rank of it really has; and what a build takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import shardc
from shardc import FullyShard, Plan, Program, Replicated
from tests.acceptance.models import MLP, MLP_TP, TRANSFORMER_TP, ConvNet, Deep, Transformer


class Counting(TorchDispatchMode):
    """Bytes of all storages that came by and are still alive, after every operator."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.see(known)

    def see(self, values: Any) -> None:
        for x in pytree.tree_leaves(values):
            x = getattr(x, "_local_tensor", x)
            if isinstance(x, Tensor) and not x.is_meta:
                storage = x.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, self.alive)

    @property
    def alive(self) -> int:
        return sum(nbytes for _, nbytes in self.held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out


@pytest.fixture
def first_of_four() -> Iterator[None]:
    """Collectives of this process group move nothing, and take the memory they always do."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def measured(compiled: Any, x: Tensor) -> tuple[int, Program]:
    """The most bytes that the first rank holds in a forward and a backward of the program, its own included."""
    entry, flat = compiled._bound.prepared((x,), {})
    tangents = [torch.ones_like(compiled(x))]
    with Counting(flat) as counted:
        results, saved = entry.run.halfway(flat)
        del results
        counted.see(tangents)
        gradients = entry.run.gradients(saved, tangents)
    assert sum(g is not None for g in gradients) == len(list(compiled.parameters()))
    return counted.peak, entry.program


def tokens(rows: int) -> Tensor:
    return torch.randint(16, (rows, 8))


class Counts(nn.Linear):
    """Draws by an operator that meta tensors do not have."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y * torch.binomial(y.detach().abs(), y.detach().sigmoid())


TWO = {"dp": 2, "tp": 2}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int], Tensor]] = {
    "mlp": (lambda: MLP(32, 64), MLP_TP, {"tp": 4}, torch.randn(16, 32)),
    "mlp, replicas": (lambda: MLP(32, 64), Replicated(), {"dp": 4}, torch.randn(16, 32)),
    "deep, units": (lambda: Deep(4, 33), Plan(dp=FullyShard("layers.*")), {"dp": 4}, torch.randn(16, 33)),
    "deep, some ranks": (
        lambda: Deep(4, 33), Plan(dp=FullyShard("layers.*", reshard_after_forward=2)), {"dp": 4}, torch.randn(16, 33)
    ),
    "large gradients": (lambda: MLP(512, 1024), Replicated(), {"dp": 4}, torch.randn(16, 512)),
    "large gradients, two by two": (
        lambda: MLP(512, 1024), Plan(dp=Replicated(), tp=Replicated()), TWO, torch.randn(16, 512)
    ),
    "no form on meta": (lambda: Counts(32, 64), Replicated(), {"dp": 4}, torch.randn(64, 32)),
    "convolutions": (ConvNet, Replicated(), {"dp": 4}, torch.randn(4, 3, 8, 8)),
    "transformer": (lambda: Transformer(dim=32), TRANSFORMER_TP, {"tp": 4}, tokens(4)),
    "transformer, both": (
        lambda: Transformer(dim=32), Plan(dp=FullyShard("layers.*"), tp=TRANSFORMER_TP), TWO, tokens(2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_what_a_rank_holds(case: str, first_of_four: None):
    make, plan, sizes, x = CASES[case]
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    compiled = shardc.compile(make(), plan, mesh=mesh)
    peak, program = measured(compiled, x)
    assert abs(program.peak_bytes() / peak - 1) < 0.03, (program.peak_bytes(), peak)


def through_autograd(compiled: Any, x: Tensor, **options: Any) -> int:
    compiled(x).sum().backward()
    compiled.zero_grad()
    with Counting([*compiled.parameters()], x) as counted:
        compiled(x).sum().backward(**options)
    return counted.peak


def test_activations_die_in_backward_at_their_last_use(first_of_four: None):
    """Unless the graph is retained: then all of them are there for the second time."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    compiled, x = shardc.compile(Deep(8, 33), Replicated(), mesh=mesh), torch.randn(512, 33)
    freed, kept = through_autograd(compiled, x), through_autograd(compiled, x, retain_graph=True)
    assert freed == pytest.approx(compiled.programs[-1].peak_bytes(), rel=0.03)
    assert kept > 1.2 * freed


def test_a_retained_graph_goes_backward_twice_and_another_once(first_of_four: None):
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    compiled = shardc.compile(Deep(2, 33), Replicated(), mesh=mesh)
    loss = compiled(torch.randn(4, 33)).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in compiled.parameters() if p.grad is not None]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(compiled.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


# --- building


class Wide(nn.Module):
    """Several layers, one of them larger than the others, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 63, bias=False)
        self.stats = nn.BatchNorm1d(63)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.stats(self.down(self.up(x)))


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Wide()


@pytest.mark.parametrize("build", [lambda: shardc.deferred_init(Wide), on_meta], ids=["deferred", "meta"])
def test_a_build_takes_the_shards_and_the_largest_parameter(build: Callable[[], nn.Module], first_of_four: None):
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    whole = nbytes(*Wide().parameters())
    with Counting() as counted:
        compiled = shardc.compile(build(), Plan(dp=FullyShard("layers.*")), mesh=mesh)
    shards = nbytes(*(getattr(x, "_local_tensor", x) for x in [*compiled.parameters(), *compiled.buffers()]))
    largest = nbytes(compiled.up.weight)  # pyright: ignore
    slack = 16 << 10  # states of the random generator
    assert shards <= counted.alive <= shards + slack
    assert counted.peak <= shards + largest + slack < 0.8 * whole


def test_a_rank_holds_the_chunks_of_torch_three_times_over(first_of_four: None):
    """Parameters, gradients and the two moments of Adam, to the byte."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    compiled = shardc.compile(Wide(), Plan(dp=FullyShard("layers.*")), mesh=mesh)
    optimizer = torch.optim.Adam(compiled.parameters())
    compiled(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    for (name, p), alone in zip(compiled.named_parameters(), Wide().parameters(), strict=True):
        want = nbytes(alone.chunk(4)[0])
        moments = [optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")]
        assert p.grad is not None
        assert [x.to_local().untyped_storage().nbytes() for x in (p, p.grad, *moments)] == 4 * [want], name  # pyright: ignore
