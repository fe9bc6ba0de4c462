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
    entry, flat = compiled.prepared((x,), {})
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


TWO = {"dp": 2, "tp": 2}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int], Tensor]] = {
    "mlp": (lambda: MLP(32, 64), MLP_TP, {"tp": 4}, torch.randn(16, 32)),
    "mlp, replicas": (lambda: MLP(32, 64), Replicated(), {"dp": 4}, torch.randn(16, 32)),
    "deep, units": (lambda: Deep(4, 33), Plan(dp=FullyShard("layers.*")), {"dp": 4}, torch.randn(16, 33)),
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
