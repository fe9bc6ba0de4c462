"""Models on meta: filled at compile as a normal build from the same seed would be, by their own or by given functions.

Fresh memory holds NaN here: what nothing was written to would show.
"""

# ruff: noqa: E501  (what is printed is not wrapped)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import shardc
from shardc import FullyShard, Mesh, Replicated
from shardc.runtime.values.deferred import tensors
from tests.acceptance.models import MLP, MLP_TP, ConvNet, Llama, rotary
from tests.acceptance.starts.test_deferred_init import poisoned, same_bits
from tests.acceptance.test_mistakes import said
from tests.runtime.ranks import on_ranks, run_ranks

__all__ = ["poisoned"]

TWO = Mesh(dp=2)


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Rope(nn.Module):
    """Tables that no state_dict holds."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("cos", torch.empty(length, dim), persistent=False)
        self.register_buffer("sin", torch.empty(length, dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table, values in zip((self.cos, self.sin), rotary(*self.cos.shape), strict=True):
            table.copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cos + x.flip(-1) * self.sin


class Small(nn.Module):
    """Sizes that split evenly, unevenly, and not at all; tables; a tied weight; a frozen one; statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rope, self.norm = nn.Embedding(13, 8), Rope(4, 8), Norm(8)
        self.up, self.down = nn.Linear(8, 3), nn.Linear(3, 1)
        self.stats = nn.BatchNorm1d(4)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.up.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stats(self.norm(self.rope(self.embed(ids))))
        return self.head(x) + self.down(self.up(x))


def both(make: Callable[[], nn.Module], seed: int = 3) -> tuple[nn.Module, nn.Module]:
    """(a normal build, one on meta), the generator as it was before the first."""
    torch.manual_seed(seed)
    alone = make()
    with torch.device("meta"):
        model = make()
    torch.manual_seed(seed)
    return alone, model


PLANS = {"dp": Replicated(), "fsdp": FullyShard()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [MLP, ConvNet, Small])
def test_equals_a_normal_build(make: Callable[[], nn.Module], plan: str, dtype: torch.dtype):
    """Cases 69, 70, 74: seeds, order of draws, and where the generator stands afterwards."""
    alone, model = both(lambda: make().to(dtype) if dtype == torch.float32 else _in(dtype, make))
    compiled = shardc.compile(model, PLANS[plan], mesh=TWO)
    same_bits(compiled, alone)
    torch.manual_seed(3)
    _in(dtype, make)
    assert torch.equal(torch.randn(3), _after(make, dtype))


def _in(dtype: torch.dtype, make: Callable[[], nn.Module]) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def _after(make: Callable[[], nn.Module], dtype: torch.dtype) -> Tensor:
    _, model = both(lambda: _in(dtype, make))
    shardc.compile(model, Replicated(), mesh=TWO)
    return torch.randn(3)


def test_a_step_equals_one_device():
    """Cases 69 and 208."""
    alone, model = both(Small)
    compiled = shardc.compile(model, FullyShard(), mesh=TWO)
    ids = torch.randint(13, (4, 4))
    for one in (compiled, alone):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        one(ids).square().mean().backward()
        optimizer.step()
    for name, want in tensors(alone).items():
        torch.testing.assert_close(
            tensors(compiled)[name], want, rtol=2e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_a_function_is_called_for_every_module_that_owns_tensors_on_meta():
    """Case 69, with a function."""
    seen: list[str] = []

    def init(module: nn.Module) -> None:
        seen.append(type(module).__name__)
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02), module.bias.data.zero_()

    alone, model = both(MLP)
    for module in alone.modules():
        init(module)
    torch.manual_seed(3)
    seen.clear()
    compiled = shardc.compile(model, MLP_TP, mesh=Mesh(tp=2), init=init)
    assert seen == ["Linear", "Linear"]
    torch.manual_seed(3)
    for module in alone.modules():
        init(module)
    same_bits(compiled, alone)


def test_what_is_real_keeps_its_values():
    """Case 71; a module that has both kinds draws as if all were on meta."""
    alone, model = both(ConvNet)
    real = ConvNet()
    model.bn1, model.fc = real.bn1, real.fc
    model.conv2.bias = nn.Parameter(torch.full((6,), 5.0))
    torch.manual_seed(3)
    compiled = shardc.compile(model, Replicated(), mesh=TWO)
    assert torch.equal(compiled.fc.weight, real.fc.weight) and compiled.bn1 is real.bn1
    assert bool((compiled.conv2.bias == 5).all())
    assert torch.equal(compiled.conv1.weight, alone.get_parameter("conv1.weight"))
    assert torch.equal(compiled.bn2.running_var, torch.ones(6))


# --- refused


class OthersWeight(nn.Module):
    """Writes into a part that has its values already."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.lin = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale), nn.init.zeros_(self.lin.weight)


def compiles(model: nn.Module, **options: Any) -> str:
    return said(lambda: shardc.compile(model, Replicated(), mesh=TWO, **options))


def test_refused_before_anything_is_allocated():
    """Case 72, and modules that cannot be filled."""
    with pytest.raises(ValueError, match="to be callable"):
        shardc.compile(MLP().to("meta"), Replicated(), mesh=TWO, init=3)
    assert_expected_inline(
        compiles(Llama().to("meta")),
        """\
PlanError: plan error: on meta, in modules without reset_parameters: cos, sin, layers.0.norm1.weight, layers.0.norm2.weight, norm.weight
  --> test_meta_init.py:N
   = help: give compile an init: a function of each such module, a state_dict or a path, or a pair of them (path, function) where a file lacks some; or use deferred_init""",
    )


def reset_what_is_on_meta(module: nn.Module) -> None:
    """What FSDP's users pass: it asks first."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(x.is_meta for x in own):
        assert all(x.device.type == "meta" for x in own if x.is_meta)
        module.to_empty(device="cpu", recurse=False)
        assert not any(x.is_meta or x.device.type == "meta" for x in own_of(module))
        module.reset_parameters()


def own_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@pytest.mark.parametrize("plan", [Replicated(), FullyShard("up")])
def test_an_init_that_asks_what_is_on_meta_is_told(plan):
    """Then `to_empty` makes memory, and `reset_parameters` fills it."""
    with torch.device("meta"):
        model = Small()
    compiled = shardc.compile(model, plan, mesh=TWO, init=reset_what_is_on_meta)
    for name in ("embed.weight", "norm.weight", "rope.cos", "stats.running_var"):
        assert not tensors(compiled)[name].isnan().any(), name
    assert compiled.head.weight is compiled.embed.weight


class Tables(nn.Module):
    """A weight in the file, a table that no file holds, and an adapter that this one lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.adapter = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.up(x) * self.table)


def fill_what_is_missing(module: nn.Module) -> None:
    if isinstance(module, Tables):
        module.table.copy_(torch.arange(4.0))
    else:
        nn.init.eye_(module.weight)


@pytest.mark.parametrize("kind", ["state_dict", "file"])
def test_a_pair_loads_what_there_is_and_fills_the_rest(kind: str, tmp_path: Path):
    one = Tables()
    saved = {name: x for name, x in one.state_dict().items() if name.startswith("up")}
    source: Any = saved
    if kind == "file":
        source = tmp_path / "model.safetensors"
        save_file(saved, source)
    with torch.device("meta"):
        model = Tables()
    compiled = shardc.compile(model, FullyShard(), mesh=TWO, init=(source, fill_what_is_missing))
    assert torch.equal(compiled.up.weight, one.up.weight) and torch.equal(compiled.up.bias, one.up.bias)
    assert torch.equal(compiled.table, one.table) and torch.equal(compiled.adapter.weight, torch.eye(4))
    with torch.device("meta"):
        alone = Tables()
    with pytest.raises(ValueError, match="on meta, in modules without reset_parameters: table"):
        shardc.compile(alone, FullyShard(), mesh=TWO, init=(source, None))
    with pytest.raises(ValueError, match="which ought to be callable"):
        shardc.compile(alone, FullyShard(), mesh=TWO, init=(source, 3))


def test_an_init_that_leaves_something_out_or_writes_elsewhere():
    assert_expected_inline(
        compiles(MLP().to("meta"), init=lambda module: nn.init.zeros_(module.bias)),
        """\
PlanError: plan error: nothing gives values to: net1.weight, net2.weight
  --> test_meta_init.py:N
   = help: fill them in the constructor, in reset_parameters, or in the function given as init""",
    )
    model = OthersWeight()
    model.scale = nn.Parameter(torch.empty(3, device="meta"))
    assert_expected_inline(
        compiles(model),
        """\
ShardingError: sharding error: init writes to lin.weight, which has its values already
  --> test_meta_init.py:N
   = help: let the init of each module fill the module's own tensors""",
    )
    assert_expected_inline(
        compiles(MLP(), init={}),
        """\
PlanError: plan error: init is given, but nothing is on meta
  --> test_meta_init.py:N
   = help: load into the compiled module instead""",
    )


# --- loading


def test_a_state_dict_or_a_file_fills_it(tmp_path: Path):
    """Tables that neither holds are filled by their modules."""
    alone = Small()
    shardc.save_safetensors(tmp_path / "w.safetensors", alone)
    shardc.save_checkpoint(tmp_path / "dcp", alone)
    for init in (alone.state_dict(), tmp_path / "w.safetensors", str(tmp_path / "dcp"), tmp_path):
        with torch.device("meta"):
            model = Small()
        same_bits(shardc.compile(model, FullyShard(), mesh=TWO, init=init), alone)
    model = shardc.compile(shardc.deferred_init(Small), FullyShard(), mesh=TWO, init=alone.state_dict())
    same_bits(model, alone)


def test_weights_that_do_not_fit(tmp_path: Path):
    state = MLP().state_dict()
    path = tmp_path / "w.safetensors"
    shardc.save_safetensors(path, nn.Linear(3, 3))
    meta = MLP().to("meta")
    assert_expected_inline(
        compiles(meta, init={**state, "net1.bias": torch.ones(3)}),
        """\
CheckpointError: checkpoint error: values of another shape: net1.bias (here (23,))
   = help: nothing was loaded""",
    )
    assert_expected_inline(
        compiles(meta, init=path).replace(str(tmp_path), "TMP"),
        """\
CheckpointError: checkpoint error: the model has nothing of these names: bias, weight
   = help: nothing was loaded""",
    )
    text = path.read_bytes()
    path.write_bytes(text[:-8])
    assert_expected_inline(
        compiles(meta, init=path),
        """\
CheckpointError: checkpoint error: w.safetensors is damaged: incomplete metadata, file not fully covered
   = help: write or fetch the file again""",
    )
    path.write_bytes(text[:20])
    assert_expected_inline(
        compiles(meta, init=path),
        """\
CheckpointError: checkpoint error: w.safetensors is damaged: invalid header length
   = help: write or fetch the file again""",
    )
    assert_expected_inline(
        compiles(meta, init=tmp_path / "none").replace(str(tmp_path), "TMP"),
        """\
CheckpointError: checkpoint error: there are no weights at TMP/none
   = help: give a .safetensors file, a folder of them, or a DCP folder""",
    )
    assert all(x.is_meta for x in meta.parameters())


def test_loaded_in_pieces():
    """Cases 73 and 109."""
    alone = MLP()
    state = alone.state_dict()
    compiled = shardc.compile(MLP().to("meta"), MLP_TP, mesh=Mesh(tp=2), init={"net1.weight": state["net1.weight"]})
    x = torch.randn(8, 16)
    assert_expected_inline(
        said(lambda: compiled(x)),
        """\
PlanError: plan error: still on meta, without values: net1.bias, net2.weight, net2.bias
  --> test_meta_init.py:N
   = help: load them (load_state_dict, load_checkpoint) before the first call""",
    )
    result = compiled.load_state_dict({"net1.bias": state["net1.bias"]}, strict=False)
    assert result.missing_keys == ["net1.weight", "net2.weight", "net2.bias"]
    assert_expected_inline(
        said(lambda: compiled(x)),
        """\
PlanError: plan error: still on meta, without values: net2.weight, net2.bias
  --> test_meta_init.py:N
   = help: load them (load_state_dict, load_checkpoint) before the first call""",
    )
    compiled.load_state_dict(state)
    torch.testing.assert_close(compiled(x), alone(x))


# --- on real ranks


def filled_on_ranks(rank: int, folder: str) -> None:
    """Cases 69 to 76 on ranks whose seeds differ: the first one's counts, and others draw on as they did."""
    torch.use_deterministic_algorithms(True)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    alone, model = both(Small)
    torch.manual_seed(3 + rank)
    own = torch.randn(2, generator=torch.Generator().manual_seed(4))
    compiled = shardc.compile(model, FullyShard(), mesh=mesh)
    assert rank == 0 or torch.equal(torch.randn(2), own)
    joined_are(compiled, alone)
    assert compiled.head.weight is compiled.embed.weight and not compiled.up.weight.requires_grad

    with torch.device("meta"):
        model = Small()
    later = shardc.compile(model, FullyShard(), mesh=mesh, init={})
    with pytest.raises(shardc.PlanError, match="still on meta, without values: embed.weight, norm.weight"):
        later(torch.zeros(2, 4, dtype=torch.long))
    torch.manual_seed(3)
    later.load_full_state_dict(Small().state_dict() if rank == 0 else {})
    joined_are(later, alone)
    with pytest.raises(ValueError, match="of another shape: up.bias"):
        later.load_full_state_dict({**alone.state_dict(), "up.bias": torch.ones(4)} if rank == 0 else {})

    with torch.device("meta"):
        model = Small()
    given = shardc.compile(model, FullyShard(), mesh=mesh, init=alone.state_dict() if rank == 0 else {})
    joined_are(given, alone)
    full = given.full_state_dict(rank0_only=True)
    assert list(full) == (list(alone.state_dict()) if rank == 0 else [])

    if rank == 0:
        shardc.save_safetensors(Path(folder) / "alone.safetensors", MLP())
    shardc.save_safetensors(Path(folder) / "all.safetensors", given)
    with torch.device("meta"):
        model = Small()
    joined_are(shardc.compile(model, FullyShard(), mesh=mesh, init=Path(folder) / "all.safetensors"), alone)


def joined_are(compiled: nn.Module, alone: nn.Module) -> None:
    for name, want in tensors(alone).items():
        have = tensors(compiled)[name]
        have = have.full_tensor() if isinstance(have, DTensor) else have
        torch.testing.assert_close(have, want, rtol=0, atol=0, msg=lambda t, n=name: f"{n}: {t}")


@on_ranks
def test_filled_on_real_ranks(tmp_path: Path):
    run_ranks(filled_on_ranks, 2, (str(tmp_path),))
