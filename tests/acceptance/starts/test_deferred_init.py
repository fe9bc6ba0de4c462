"""deferred_init: built without allocating, then made exactly as a normal build from the same seed would be.

Fresh memory holds NaN here: what nothing was written to would show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import shardc
from shardc import FullyShard, Mesh, Plan, Replicated
from shardc.runtime.values.deferred import tensors
from tests.acceptance.kinds import KINDS
from tests.acceptance.models import MLP, Llama, Transformer
from tests.acceptance.test_mistakes import said
from tests.runtime.ranks import on_ranks, run_ranks

MESHES = {"1": Mesh(dp=1), "2": Mesh(dp=2), "4": Mesh(dp=4), "2x2": Mesh(dp=2, tp=2)}
PLAN = {"1": Replicated(), "2": FullyShard(), "4": Replicated(), "2x2": Plan(dp=FullyShard(), tp={})}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, new memory is filled with NaN, or the largest integer
    yield
    torch.use_deterministic_algorithms(False)


def same_bits(ours: nn.Module, theirs: nn.Module) -> None:
    """The same tensors under the same names: values, strides, flags, and which names are one tensor."""
    mine, yours = tensors(ours), tensors(theirs)
    assert list(mine) == list(yours)
    for name, want in yours.items():
        have = mine[name]
        assert isinstance(have, nn.Parameter) == isinstance(want, nn.Parameter), name
        assert (have.dtype, have.requires_grad) == (want.dtype, want.requires_grad), name
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=False, msg=lambda t, n=name: f"{n}: {t}")

    def first(held: dict[str, Tensor]) -> list[str]:
        return [next(n for n, other in held.items() if other is x) for x in held.values()]

    assert first(mine) == first(yours)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.filterwarnings("ignore:nothing is planned for the mesh dim:UserWarning", "ignore:the plan is empty")
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_normal_build(kind: str, mesh: str):
    torch.manual_seed(7)
    alone = KINDS[kind]()
    torch.manual_seed(7)
    model = shardc.deferred_init(KINDS[kind])
    assert any(x.is_meta for x in model.parameters())
    torch.manual_seed(8)  # the generator's state where it was built decides
    compiled = shardc.compile(model, PLAN[mesh], mesh=MESHES[mesh])
    same_bits(compiled, alone)
    if mesh == "2" and kind in ("rotary", "asking", "masked", "tied"):
        x = torch.randn(4, 8)
        torch.testing.assert_close(compiled(x), alone(x))


@pytest.mark.parametrize("make", [MLP, Transformer, Llama])
def test_the_zoo_equals_a_normal_build(make: Callable[[], nn.Module]):
    torch.manual_seed(1)
    alone = make()
    torch.manual_seed(1)
    same_bits(shardc.compile(shardc.deferred_init(make), Replicated(), mesh=Mesh(dp=2)), alone)


def test_arguments_reach_the_constructor_and_the_generator_stays():
    before = torch.get_rng_state()
    model = shardc.deferred_init(nn.Linear, 8, 3, bias=False, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.weight.is_meta and model.weight.dtype == torch.float64
    alone = nn.Linear(8, 3, bias=False, dtype=torch.float64)
    same_bits(shardc.compile(model, Replicated(), mesh=Mesh(dp=2)), alone)


# --- what cannot be


class Resizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.lin.weight.data.resize_(5, 3)


class NeverFilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.a, self.b = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(4))


class PartlyFilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(4))
        self.a.data[:3] = 1


class ReadsGarbage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(4))
        self.a.data.mul_(2)


def compiled(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: shardc.compile(shardc.deferred_init(build), Replicated(), mesh=Mesh(dp=2))


def test_a_storage_that_is_resized():
    assert_expected_inline(
        said(compiled(Resizes)),
        """\
ShardingError: sharding error: aten.resize_.default cannot be recorded: it gives a tensor another storage or size
  --> test_deferred_init.py:N
   = help: build without deferred_init (and compile the real module), or take this call out of the constructor""",
    )


class Scratch(nn.Module):
    """A cache, made as code that writes before it reads makes one, under another module too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("cache", torch.empty(2, 4))
        self.register_buffer("grid", torch.empty_like(self.cache), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.copy_(self.up(x)[:2])
        return self.up(x) + self.cache.sum()


@pytest.mark.parametrize("init", [None, {}, lambda module: None])
def test_memory_that_a_normal_build_leaves_as_it_came_is_left_so_and_named(init):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="nothing was written to cache, grid: they hold what memory held"):
        model = shardc.compile(shardc.deferred_init(Scratch), FullyShard(), mesh=Mesh(dp=2), init=init)
    torch.manual_seed(0)
    one = Scratch()
    assert torch.equal(model.up.weight, one.up.weight)
    assert model.cache.isnan().all() and model.grid.isnan().all()  # as poisoned memory is
    x = torch.randn(4, 4)
    torch.testing.assert_close(model(x), one(x))
    torch.testing.assert_close(model.cache, one.cache)


@pytest.mark.parametrize("build, names, unwritten", [(NeverFilled, "a, b", 7), (PartlyFilled, "a", 1)])
def test_parameters_that_nothing_is_written_to_are_named(build, names: str, unwritten: int):
    with pytest.warns(UserWarning, match=f"nothing was written to {names}:"):
        model = shardc.compile(shardc.deferred_init(build), Replicated(), mesh=Mesh(dp=2))
    assert sum(int(x.isnan().sum()) for x in model.parameters()) == unwritten


def test_memory_that_is_read_before_anything_is_written_to_it():
    assert_expected_inline(
        said(compiled(ReadsGarbage)),
        """\
ShardingError: sharding error: aten.mul_.Tensor reads memory that nothing was written to
  --> test_deferred_init.py:N
   = help: fill the tensor before it is read""",
    )


def test_a_module_changed_after_it_was_built():
    def scaled() -> nn.Module:
        model = shardc.deferred_init(MLP)
        model.net1.weight.data.mul_(2)  # pyright: ignore
        return shardc.compile(model, Replicated(), mesh=Mesh(dp=2))

    def cast() -> nn.Module:
        return shardc.compile(shardc.deferred_init(MLP).double(), Replicated(), mesh=Mesh(dp=2))

    def drawn() -> nn.Module:
        model = shardc.deferred_init(MLP)
        nn.init.zeros_(model.net1.bias)  # pyright: ignore
        return shardc.compile(model, Replicated(), mesh=Mesh(dp=2))

    assert_expected_inline(
        said(scaled),
        """\
PlanError: plan error: net1.weight was changed after deferred_init, where it has no values yet
  --> test_deferred_init.py:N
   = help: do it inside: deferred_init takes any function that builds the module""",
    )
    assert_expected_inline(
        said(drawn),
        """\
PlanError: plan error: net1.bias was changed after deferred_init, where it has no values yet
  --> test_deferred_init.py:N
   = help: do it inside: deferred_init takes any function that builds the module""",
    )
    assert_expected_inline(
        said(cast),
        """\
PlanError: plan error: net1.weight was changed after deferred_init, where it has no values yet
  --> test_deferred_init.py:N
   = help: do it inside: deferred_init takes any function that builds the module""",
    )


def test_a_copy_of_what_has_no_values():
    assert_expected_inline(
        said(lambda: copy.deepcopy(shardc.deferred_init(MLP))),
        """\
PlanError: plan error: net1.weight was changed after deferred_init, where it has no values yet
  --> test_deferred_init.py:N
   = help: do it inside: deferred_init takes any function that builds the module""",
    )


def test_what_builds_no_module():
    with pytest.raises(TypeError, match="was given a Tensor"):
        shardc.deferred_init(torch.zeros, 3)  # pyright: ignore


# --- on real ranks, of which all but one need not be there


@pytest.mark.filterwarnings("ignore:nothing is planned for the mesh dim:UserWarning")
@pytest.mark.parametrize(("rank", "sizes"), [(r, s) for s in ((1,), (2,), (4,), (2, 2)) for r in range(math.prod(s))])
def test_each_rank_holds_its_slice_of_the_normal_build(rank: int, sizes: tuple[int, ...]):
    """No rank tells another anything: each draws what is its own, bit for bit."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(sizes))
    try:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[: len(sizes)])
        plan = Plan(dp=FullyShard(), tp=FullyShard(placement=last)) if len(sizes) == 2 else FullyShard()
        for make in KINDS.values():
            holds_its_slice(make, plan, mesh)
    finally:
        dist.destroy_process_group()


def last(p: Tensor) -> Shard:
    return Shard(p.dim() - 1)


def holds_its_slice(make: Callable[[], nn.Module], plan: Any, mesh: Any) -> None:
    torch.manual_seed(7)
    alone = make()
    torch.manual_seed(7)
    compiled = shardc.compile(shardc.deferred_init(make), plan, mesh=mesh)
    split = 0
    for name, want in tensors(alone).items():
        have = tensors(compiled)[name]
        if isinstance(have, DTensor):
            for i, placement in enumerate(have.placements):
                want = dealt(want, placement, mesh.size(i), mesh.get_local_rank(i))
            have, split = have.to_local(), split + 1
        torch.testing.assert_close(have, want, rtol=0, atol=0, msg=lambda t, n=name: f"{n}: {t}")
    assert split


def dealt(x: Tensor, placement: Any, ways: int, place: int) -> Tensor:
    if not isinstance(placement, Shard):
        assert isinstance(placement, Replicate)
        return x
    pieces = x.chunk(ways, placement.dim)
    return pieces[place] if place < len(pieces) else x.narrow(placement.dim, 0, 0)


def shards_of(rank: int, world: int) -> int:
    """Every kind on a mesh of real ranks: shards joined are the normal build's, bit for bit."""
    torch.use_deterministic_algorithms(True)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    sharded = 0
    for make in KINDS.values():
        torch.manual_seed(7)
        alone = make()
        torch.manual_seed(7)
        model = shardc.deferred_init(make)
        torch.manual_seed(rank)
        compiled = shardc.compile(model, FullyShard(), mesh=mesh)
        for name, want in tensors(alone).items():
            have = tensors(compiled)[name]
            sharded += isinstance(have, DTensor)
            have = have.full_tensor() if isinstance(have, DTensor) else have
            torch.testing.assert_close(have, want, rtol=0, atol=0, msg=lambda t, n=name: f"{n}: {t}")
        seeds_differ(rank, mesh)
    return sharded


def seeds_differ(rank: int, mesh) -> None:
    torch.manual_seed(rank)
    with pytest.raises(shardc.RankMismatchError, match="how deferred_init built the module"):
        shardc.compile(shardc.deferred_init(MLP), FullyShard(), mesh=mesh)


@on_ranks
def test_shards_on_real_ranks():
    first, second = run_ranks(shards_of, 2, (2,))
    assert first == second > 30
