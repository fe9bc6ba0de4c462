"""Data parallel: cases 30 to 42, all ranks simulated, each beside the same model on one device.

The rule for BatchNorm: statistics, running ones included, are those of the global batch, so they are the same
on every rank, and one call counts once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.checkpoint import checkpoint

import shardc
from shardc import Mesh, Plan, PlanError, Program, Replicated
from shardc.compiler.ir import collectives as c
from tests.acceptance.compare import EXACT, SGD, compare, counts, same_gradients, same_state, wire_bytes
from tests.acceptance.models import MLP, ConvNet, Deep, Nested

ways = pytest.mark.parametrize("w", [2, 4])


def reductions(n: int, mesh_dim: str = "dp") -> dict[tuple[str, str, str], int]:
    """What `counts` says of n all-reduces in backward, and of nothing else."""
    return {("all_reduce", mesh_dim, "backward"): n}


def train(
    compiled: nn.Module,
    alone: nn.Module,
    batch: Tensor,
    steps: int = 2,
    optimizer: Callable[..., Any] = SGD,
    shuffled: bool = True,
) -> None:
    """Both see the same batch, its rows in a new order at each step; gradients and parameters stay equal."""
    optimizers = [optimizer(m.parameters()) for m in (compiled, alone)]
    for _ in range(steps):
        rows = batch[torch.randperm(len(batch))] if shuffled else batch
        for module, optim in zip((compiled, alone), optimizers, strict=True):
            optim.zero_grad()
            module(rows).square().mean().backward()
        same_gradients(compiled, alone, EXACT)
        for optim in optimizers:
            optim.step()
        same_state(compiled, alone, EXACT)


def whole_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# --- 30, 31: what is replicated


@ways
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_replicated_model_trains_as_on_the_full_batch(w: int, optimizer: type):
    """Case 30."""
    model = MLP().double()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Plan(dp=Replicated()), mesh=Mesh(dp=w))
    batch = torch.randn(3 * w + 1, 16, dtype=torch.float64)
    train(compiled, alone, batch, optimizer=lambda params: optimizer(params, lr=0.01))
    (program,) = compiled.programs
    assert counts(program) == reductions(1)
    assert wire_bytes(program) == 2 * (w - 1) * whole_bytes(alone) // w


@ways
def test_a_bare_entry_and_an_annotation_say_the_same(w: int):
    """Case 30."""
    x = torch.randn(8, 16)
    torch.manual_seed(0)
    planned = compare(MLP(), Replicated(), Mesh(dp=w), x, grads=False)
    torch.manual_seed(0)
    marked = compare(shardc.replicate(MLP()), None, Mesh(dp=w), x, grads=False)
    assert str(planned) == str(marked)
    assert counts(marked) == reductions(1)


@ways
def test_children_replicated_one_by_one_train_as_the_whole(w: int):
    """Case 31."""
    model = nn.Sequential(nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    alone = copy.deepcopy(model)
    before = [(name, id(p)) for name, p in model.named_parameters()]
    for child in model:
        shardc.replicate(child)
    compiled = shardc.compile(model, mesh=Mesh(dp=w))
    assert [(name, id(p)) for name, p in compiled.named_parameters()] == before
    train(compiled, alone, torch.randn(9, 16, dtype=torch.float64))
    assert counts(compiled.programs[-1]) == reductions(1)


def test_a_parameter_that_nothing_covers_is_warned_of():
    """Case 31."""
    model = MLP()
    shardc.replicate(model.net1)
    with pytest.warns(UserWarning, match="no annotation covers net2.weight and 1 more: gradients stay local over dp"):
        shardc.compile(model, mesh=Mesh(dp=2))


def test_tensor_parallel_within_replicas_reduces_each_gradient_once():
    """Case 31, two mesh dims."""
    plan = Plan(dp=Replicated(), tp={"net1": ColwiseParallel(), "net2": RowwiseParallel()})
    program = compare(MLP(), plan, Mesh(dp=2, tp=2), torch.randn(6, 16), steps=2, grads=False)
    found = counts(program)
    assert found == {("all_reduce", "tp", "forward"): 1, ("all_reduce", "dp", "backward"): 1}


# --- 32: state


@ways
def test_state_dict_is_the_models_own(w: int):
    """Case 32: keys, order, dtypes and values; what one of them saves the other loads."""
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3).double().bfloat16())
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated(), mesh=Mesh(dp=w))
    same_state(compiled, alone)
    assert [v.dtype for v in compiled.state_dict().values()] == [v.dtype for v in alone.state_dict().values()]
    assert list(compiled.full_state_dict()) == list(alone.state_dict())
    with torch.no_grad():
        for p in alone.parameters():
            p.normal_()
    held = [p.data_ptr() for p in compiled.parameters()]
    assert str(compiled.load_state_dict(alone.state_dict())) == "<All keys matched successfully>"
    same_state(compiled, alone)
    assert [p.data_ptr() for p in compiled.parameters()] == held
    with torch.no_grad():
        for p in compiled.parameters():
            p.zero_()
    alone.load_state_dict(compiled.state_dict())
    same_state(compiled, alone)


def test_loading_another_models_state_is_the_modules_own_error():
    """Case 32."""
    compiled = shardc.compile(MLP(), Replicated(), mesh=Mesh(dp=2))
    with pytest.raises(RuntimeError, match='Missing key.*"net1.weight"'):
        compiled.load_state_dict({})
    missing = compiled.load_state_dict({"net1.bias": torch.zeros(23), "stranger": torch.zeros(1)}, strict=False)
    assert missing.unexpected_keys == ["stranger"] and len(missing.missing_keys) == 3


# --- 33, 34: options


@pytest.mark.parametrize("bucket_mb", [1e-4, 0.001, 25, 1000])
def test_the_size_of_buckets_changes_no_number(bucket_mb: float):
    """Case 33."""
    compare(Nested(), Replicated(bucket_mb=bucket_mb), Mesh(dp=4), torch.randn(7, 16), steps=2)


def test_options_of_distributed_data_parallel_change_nothing():
    """Case 33."""
    texts = []
    for options in ({}, {"gradient_as_bucket_view": True, "static_graph": True, "find_unused_parameters": False}):
        torch.manual_seed(0)
        model = shardc.replicate(MLP(), bucket_cap_mb=1, **options)
        texts.append(str(compare(model, None, Mesh(dp=2), torch.randn(6, 16))))
    assert texts[0] == texts[1]


def test_an_ignored_child_keeps_its_own_gradient_on_simulated_ranks_too():
    """Case 34: the sum of what the ranks have; real ranks keep their summands apart (test_data_parallel.py)."""
    model = Nested()
    program = compare(model, Replicated(ignored_modules="encoder"), Mesh(dp=2), torch.randn(6, 16))
    names = [f"encoder.{child}.{p}" for child in ("net1", "net2") for p in ("bias", "weight")]
    assert sorted(name for name, layout in program.plan.params.items() if layout.local) == names


# --- 35: bad options


class NoDeviceMesh:
    """Stands where a torch DeviceMesh would; touching it at all is too late."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of the mesh was asked for before the plan was checked")


BAD = {
    "a list of devices": (RuntimeError, "device_id", lambda: shardc.replicate(MLP(), device_id=["cpu"])),  # pyright: ignore
    "a flag as device": (RuntimeError, "device_id", lambda: shardc.replicate(MLP(), device_id=True)),
    "a negative bucket": (PlanError, "bucket_cap_mb", lambda: shardc.replicate(MLP(), bucket_cap_mb=-1)),
    "a negative bucket in a plan": (PlanError, "bucket_mb", lambda: Replicated(bucket_mb=-1)),
    "no bucket": (PlanError, "bucket_mb", lambda: Replicated(bucket_mb=0)),
    "an integer on the wire": (PlanError, "reduce_dtype", lambda: Replicated(reduce_dtype=torch.int32)),
    "an unknown option": (PlanError, "find_unused", lambda: shardc.replicate(MLP(), find_unused=True)),
    "an unknown mesh dim": (
        PlanError, "ddp",
        lambda: shardc.compile(shardc.replicate(MLP(), mesh_dim="ddp"), mesh=Mesh(dp=2, tp=2)),
    ),
    "an unknown mesh dim in a plan": (
        PlanError, "ddp", lambda: shardc.compile(MLP(), Plan(ddp=Replicated()), mesh=Mesh(dp=2)),
    ),
    "no mesh": (PlanError, "mesh", lambda: shardc.compile(MLP(), Replicated(), mesh=NoDeviceMesh())),  # pyright: ignore
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_named_at_once(name: str):
    """Case 35. There is no process group here: whatever asked ranks for anything would fail otherwise."""
    kind, option, call = BAD[name]
    with pytest.raises(kind, match=option):
        call()


# --- 36: accumulation


@ways
def test_unsynchronised_steps_accumulate_as_on_one_device(w: int):
    """Case 36: simulated ranks hold the global gradient in any case."""
    model = MLP().double()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated(), mesh=Mesh(dp=w))
    batches = torch.randn(3, 5, 16, dtype=torch.float64)
    for i, batch in enumerate(batches):
        alone(batch).square().mean().backward()
        if i < 2:
            with compiled.no_sync():
                compiled(batch).square().mean().backward()
        else:
            compiled(batch).square().mean().backward()
        same_gradients(compiled, alone, EXACT)


def test_two_forwards_and_one_backward_give_both_gradients():
    """Case 36."""
    model = MLP().double()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated(), mesh=Mesh(dp=2))
    first, second = torch.randn(2, 5, 16, dtype=torch.float64)
    for module in (compiled, alone):
        (module(first).square().mean() * module(second).mean()).backward()
    same_gradients(compiled, alone, EXACT)
    assert len(compiled.programs) == 1


# --- 37: recomputation


class Checkpointed(nn.Module):
    """The middle one of three MLPs under torch's own activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = MLP(), MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.middle, x, use_reentrant=False)  # pyright: ignore
        return self.last(x)


class Plain(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def forward_products(program: Program) -> dict[str, int]:
    """How many products with a weight, as forward makes them, each child has in the backward half."""
    assert program.halves.backward is not None
    found: dict[str, int] = {}
    for node in program.halves.backward.graph.nodes:
        if str(node.target) in ("aten.mm.default", "aten.addmm.default") and node.meta["phase"] == "forward":
            child = node.meta["path"].split(".")[0]
            found[child] = found.get(child, 0) + 1
    return found


@pytest.mark.parametrize("recompute", [None, "middle", ["middle", "last.net1"], ["*"]])
def test_what_is_named_is_computed_again_in_backward(recompute: Any):
    """Case 37. What leaves a module is kept, so a single Linear has nothing to do again."""
    program = compare(Plain(), Replicated(), Mesh(dp=2), torch.randn(6, 16), steps=2, recompute=recompute)
    again = {None: [], "*": ["first", "middle", "last"]}.get(recompute and recompute[0], ["middle"])
    assert forward_products(program) == dict.fromkeys(again, 1)
    assert counts(program) == reductions(1)


@ways
def test_a_child_under_torchs_checkpoint_is_computed_again_in_backward(w: int):
    """Case 37."""
    program = compare(Checkpointed(), Replicated(), Mesh(dp=w), torch.randn(6, 16), steps=2)
    assert forward_products(program) == {"middle": 1}
    assert counts(program) == reductions(1)


def test_recomputing_each_layer_keeps_only_what_is_between_them():
    """Case 37."""
    x = torch.randn(256, 16)
    peaks, saved = [], []
    for recompute in (None, "layers.*"):
        compiled = shardc.compile(Deep(6), Replicated(), mesh=Mesh(dp=2), recompute=recompute)
        program = compiled.lower(x)
        assert program.halves.backward is not None
        kept = [n for n in program.halves.backward.graph.nodes if n.op == "placeholder"]
        saved.append([tuple(n.meta["val"].shape) for n in kept])
        peaks.append(program.peak_bytes())
    assert peaks[1] < 0.8 * peaks[0]
    assert saved[0].count((256, 23)) == 6
    assert (256, 23) not in saved[1]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.gelu(self.norm(self.stem(x))))


def test_statistics_are_not_counted_twice_and_dropout_not_drawn_twice():
    """Case 37: what forward changed or drew is saved, not made again."""
    compiled = shardc.compile(Normed(), Replicated(), mesh=Mesh(dp=2), recompute=["norm", "drop"])
    x = torch.randn(6, 16)
    out = compiled(x)
    out.sum().backward()
    assert compiled.norm.num_batches_tracked == 1
    kept = out != 0
    bias = compiled.get_parameter("norm.bias")
    with torch.no_grad():
        normed = F.batch_norm(compiled.stem(x), None, None, training=True).requires_grad_()
    with torch.enable_grad():
        zero = torch.zeros(8, requires_grad=True)
        (F.gelu(normed.detach() + zero) * kept * 2).sum().backward()
    torch.testing.assert_close(bias.grad, zero.grad)


# --- 38, 39: buckets


class Eight(nn.Module):
    """Eight parameters of 1 KiB, the last used first in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("kib", [1, 2, 3, 8])
def test_small_buckets_are_reduced_while_gradients_are_computed(kib: int):
    """Case 38."""
    program = compare(Eight(), Replicated(bucket_mb=kib / 1024), Mesh(dp=2), torch.randn(4, 16), grads=False)
    buckets = math.ceil(8 / kib)
    assert counts(program) == reductions(buckets)
    assert program.halves.backward is not None
    nodes = [n for n in program.halves.backward.graph.nodes if n.op == "call_function"]
    begun = [i for i, n in enumerate(nodes) if n.target in (c.start, c.all_reduce)]
    products = [i for i, n in enumerate(nodes) if str(n.target) == "aten.mm.default"]
    assert len(begun) == buckets
    assert all(i < products[-1] for i in begun[:-1])
    assert begun == sorted(begun)


def test_gradients_travel_in_bf16_and_are_kept_in_fp32():
    """Case 39."""
    torch.manual_seed(0)
    model = MLP()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated(reduce_dtype=torch.bfloat16), mesh=Mesh(dp=4))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (compiled, alone)]
    x, losses = torch.randn(12, 16), []
    for module, optim in zip((compiled, alone), optimizers, strict=True):
        for _ in range(3):
            optim.zero_grad()
            loss = (module(x) - 1).square().mean()
            loss.backward()
            optim.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-2
    assert losses[0] != losses[1]  # something did travel in bf16
    (program,) = compiled.programs
    assert [(m.kind, m.dtype) for m in program.collectives()] == [("all_reduce", torch.bfloat16)]
    for p in compiled.parameters():
        assert p.dtype == p.grad.dtype == torch.float32  # pyright: ignore
        assert all(s.dtype == torch.float32 for s in optimizers[0].state[p].values())


# --- 41: batch norm


@ways
@pytest.mark.parametrize("rows", [8, 9])
def test_running_statistics_are_those_of_the_global_batch(w: int, rows: int):
    """Case 41, as the rule at the top of this file declares."""
    model = ConvNet()
    program = compare(model, Replicated(), Mesh(dp=w), torch.randn(rows, 3, 5, 5), steps=3, grads=False)
    assert model.bn1.num_batches_tracked == 3 + 1  # compare's forward after the last step
    assert {m.mesh_dim for m in program.collectives()} == {"dp"}


def test_in_evaluation_nothing_is_exchanged():
    """Case 41."""
    model = ConvNet()
    model(torch.randn(8, 3, 5, 5))
    other = copy.deepcopy(model.eval())
    program = compare(model, Replicated(), Mesh(dp=2), torch.randn(8, 3, 5, 5), grads=False)
    assert {m.phase for m in program.collectives()} == {"backward"}
    with torch.no_grad():
        lowered = shardc.compile(other, Replicated(), mesh=Mesh(dp=2)).lower(torch.randn(8, 3, 5, 5))
    assert lowered.collectives() == []


# --- 42: one rank


def test_without_a_mesh_or_ranks_there_is_one_rank():
    """Case 42."""
    model = MLP().double()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Replicated())
    train(compiled, alone, torch.randn(5, 16, dtype=torch.float64))
    (program,) = compiled.programs
    assert program.collectives() == [] and program.mesh.size == 1


@pytest.mark.parametrize("entry", [Replicated(), {"net1": ColwiseParallel(), "net2": RowwiseParallel()}])
def test_a_mesh_of_one_rank_moves_nothing(entry: Any):
    """Case 42."""
    program = compare(MLP(), entry, Mesh(tp=1), torch.randn(5, 16), steps=2)
    assert program.collectives() == []
