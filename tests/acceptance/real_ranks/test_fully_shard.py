"""FullyShard on real gloo ranks, beside torch's own fully_shard: what simulation cannot show.

Each rank passes its own rows; references are computed on every rank alone, from the whole batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Plan, PlanError, Precision, Replicated
from shardc.runtime.wire.wire import AllReduce
from tests.acceptance.models import MLP, Deep, Transformer
from tests.acceptance.plans.test_fully_shard import Framed
from tests.runtime.ranks import on_ranks, run_ranks

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def model() -> nn.Module:
    """A vocabulary and a width that 2 ranks do not divide."""
    torch.manual_seed(0)
    return Transformer(vocab=13, dim=12, heads=3, layers=2, tied=True).double()


def tokens(step: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(13, (rows, 7), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(run: nn.Module, rank: int, ranks: int, steps: int = 4) -> list[float]:
    """The mean loss over all ranks at each step of Adam."""
    optim = torch.optim.Adam(run.parameters(), lr=0.01)
    out = []
    for step in range(steps):
        ids, targets = (t.chunk(ranks)[rank] for t in tokens(step))
        optim.zero_grad()
        loss = loss_of(run(ids), targets)
        loss.backward()
        optim.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        out.append(total.item() / ranks)
    return out


def same(ours: nn.Module, theirs: nn.Module, **close: float) -> None:
    """Equal whole parameters under equal names."""
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        p, q = (t.full_tensor() if isinstance(t, DTensor) else t for t in (p, q))
        torch.testing.assert_close(p, q, **{**EXACT, **close}, msg=lambda text, n=name: f"{n}: {text}")


def beside_torch(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    theirs = model()
    for layer in theirs.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh)
    fully_shard(theirs, mesh=mesh)
    ours = shardc.compile(model(), Plan(dp=FullyShard("layers.*")), mesh=mesh)
    sizes = [p.to_local().numel() for p in ours.parameters() if isinstance(p, DTensor)]
    assert sizes == [p.to_local().numel() for p in theirs.parameters() if isinstance(p, DTensor)]
    found = [losses(m, rank, 2) for m in (ours, theirs)]
    torch.testing.assert_close(*map(torch.tensor, found), **EXACT)
    same(ours, theirs)
    kept = shardc.compile(model(), Plan(dp=FullyShard("layers.*", reshard_after_forward=False)), mesh=mesh)
    torch.testing.assert_close(torch.tensor(losses(kept, rank, 2)), torch.tensor(found[0]), **EXACT)
    return [(c.kind, c.phase) for c in ours.programs[-1].collectives()]


@on_ranks
def test_losses_and_parameters_are_those_of_fully_shard_step_for_step():
    first, second = run_ranks(beside_torch, 2)
    assert first == second
    forward, backward = ("all_gather", "forward"), ("all_gather", "backward")
    found = [first.count(what) for what in (forward, backward, ("reduce_scatter", "backward"))]
    assert found == [3, 2, 3]  # backward begins with the root's head, which is held
    assert len(first) == 8


# --- 57, 62, 63, 68: accumulation, precision, dtypes and optimizers


def deep(depth: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return Deep(depth, 7).double()


def batch(seed: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(x: Tensor, rank: int, ranks: int = 2) -> Tensor:
    return x.chunk(ranks)[rank]


def step(run: nn.Module, x: Tensor) -> None:
    run(x).square().mean().backward()


def same_grads(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad, q.grad, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


def framed() -> nn.Module:
    torch.manual_seed(1)
    return Framed(2, 7).double()


def accumulated(rank: int, mesh: Any) -> list[list[list[str]]]:
    """Three microbatches, of which two leave reductions out: all, the root's, some children's, another set each time.
    Whose gradients each program scatters."""
    alone, found = framed(), []
    for i in range(3):
        step(alone, batch(i))
    for kept in ([(), ()], [("",), ("",)], [("layers.*",), ("layers.*",)], [(), ("layers.0", "")], [("layers.1",), ()]):
        ours = shardc.compile(framed(), Plan(dp=FullyShard("layers.*")), mesh=mesh)
        for i, units in enumerate(kept):
            with ours.no_sync(*units):
                step(ours, mine(batch(i), rank))
        step(ours, mine(batch(2), rank))
        same_grads(ours, alone)
        found.append([[c.fqn for c in p.collectives() if c.kind == "reduce_scatter"] for p in ours.programs])
    try:
        with ours.no_sync("layers.7"):
            raise AssertionError("not refused")
    except PlanError as error:
        assert "no unit matches 'layers.7'" in str(error) and 'nearest name is "layers.' in str(error)
    return found


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    torch.optim.Adam,
    partial(torch.optim.AdamW, amsgrad=True, maximize=True, foreach=True),
    partial(torch.optim.Adam, lr=torch.tensor(1e-3), fused=True),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    torch.optim.Adagrad,
    partial(torch.optim.RMSprop, centered=True),
    torch.optim.Adadelta,
    torch.optim.NAdam,
    torch.optim.RAdam,
]


def optimized(rank: int, mesh: Any) -> None:
    ours, first = shardc.compile(deep(1), Plan(dp=FullyShard("layers.*")), mesh=mesh), deep(1)
    start = {name: x.clone() for name, x in ours.full_state_dict().items()}
    for make in OPTIMIZERS:
        alone = copy.deepcopy(first)
        ours.load_state_dict(start)
        optimizers = [make(m.parameters()) for m in (ours, alone)]
        for i in range(2):
            for optim in optimizers:
                optim.zero_grad()
            step(ours, mine(batch(i), rank))
            step(alone, batch(i))
            for optim in optimizers:
                optim.step()
        same(ours, alone)


def short(rank: int, mesh: Any) -> list[str]:
    """bfloat16 on the wire beside torch's own mixed precision: the same numbers, or their roundings."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    theirs = deep().float()
    for layer in theirs.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(theirs, mesh=mesh, mp_policy=policy)
    precision = Precision(param=torch.bfloat16, reduce=torch.float32)
    ours = shardc.compile(deep().float(), Plan(dp=FullyShard("layers.*")), mesh=mesh, precision=precision)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for i in range(3):
        x = mine(batch(i), rank).float()
        for one, optim in zip((ours, theirs), optimizers, strict=True):
            optim.zero_grad()
            one(x).float().square().mean().backward()
            optim.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert isinstance(p, DTensor) and isinstance(q, DTensor) and p.dtype is torch.float32
        torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=1e-3, atol=1e-3)
    return sorted({f"{c.kind} {c.dtype}" for c in ours.programs[-1].collectives()})


def tied_norms(rank: int, mesh: Any) -> None:
    """A weight that two units use counts once, whatever the norm; one that nothing uses has no gradient."""
    ours, alone = shardc.compile(model(), Plan(dp=FullyShard("layers.*")), mesh=mesh), model()
    ids, _ = tokens(0)
    for p in (1, 2, 3, math.inf):
        for one, x in ((ours, ids.chunk(2)[rank]), (alone, ids)):
            one.zero_grad()
            one(x).square().mean().backward()
        norms = ours.clip_grad_norm_(0.01, p), nn.utils.clip_grad_norm_(alone.parameters(), 0.01, p)
        torch.testing.assert_close(*norms, **EXACT)
        same_grads(ours, alone)


def a_child_alone(rank: int, mesh: Any) -> list[str]:
    """54: after a step of the root, what calling one child by itself does: refused in words, and the next step of the
    root is as if nothing had been."""
    ours, alone = shardc.compile(deep(), Plan(dp=FullyShard("layers.*")), mesh=mesh), deep()
    told = []
    for seed in range(2):
        for one, x in ((ours, mine(batch(seed), rank)), (alone, batch(seed))):
            one.zero_grad()
            step(one, x)
        same_grads(ours, alone)
        child = ours.get_submodule("layers.0")
        try:
            child(mine(batch(9), rank)).sum().backward()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        same_grads(ours, alone)
    return told


def doubled(rank: int, mesh: Any) -> None:
    """`.to(float64)` after compile, before the first step."""
    ours = shardc.compile(deep().float(), Plan(dp=FullyShard("layers.*")), mesh=mesh).to(torch.float64)
    alone = deep().float().double()
    step(ours, mine(batch(0), rank))
    step(alone, batch(0))
    assert all(p.grad is not None and p.grad.dtype is torch.float64 for p in ours.parameters())
    same_grads(ours, alone)


def on_two(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    counted = accumulated(rank, mesh)
    optimized(rank, mesh)
    doubled(rank, mesh)
    tied_norms(rank, mesh)
    return [counted, short(rank, mesh), a_child_alone(rank, mesh)]


@on_ranks
def test_accumulation_optimizers_and_dtypes():
    wire = ["all_gather torch.bfloat16", "reduce_scatter torch.float32"]
    first, second = run_ranks(on_two, 2)
    assert first == second
    every = ["", "layers.1", "layers.0"]
    assert [[sorted(names) for names in programs] for programs in first[0]] == [
        [[], sorted(every)],
        [["layers.0", "layers.1"], sorted(every)],
        [[""], sorted(every)],
        [[], ["layers.1"], sorted(every)],
        [["", "layers.0"], [], sorted(every)],
    ]
    assert first[1] == wire
    assert all("got mixed torch.Tensor and DTensor" in told for told in first[2]) and len(first[2]) == 2


# --- 58, 60, 211: two mesh dims

TP = {"net1": ColwiseParallel(), "net2": RowwiseParallel()}


def mlp(hidden: int = 8) -> nn.Module:
    torch.manual_seed(2)
    return MLP(8, hidden).double()


def clipped(rank: int, mesh: Any, plan: Any, rows: Tensor, whole: Tensor, hidden: int = 8) -> None:
    ours, alone = shardc.compile(mlp(hidden), plan, mesh=mesh), mlp(hidden)
    for p in (1, 2, 3, math.inf):
        for one, x in ((ours, rows), (alone, whole)):
            one.zero_grad()
            step(one, x)
        with mock.patch.object(AllReduce, "start", autospec=True, side_effect=AllReduce.start) as reduced:
            ours_norm = ours.clip_grad_norm_(0.01, p)
        over = [call.args[0].line.axis for call in reduced.call_args_list]
        assert over and len(over) == len(set(over))  # at most one per mesh dim
        norms = ours_norm, nn.utils.clip_grad_norm_(alone.parameters(), 0.01, p)
        torch.testing.assert_close(*norms, **EXACT)
        same_grads(ours, alone)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def fused_heads_are_not_moved(rank: int, mesh: Any) -> None:
    """Whole heads of a fused projection lie on tp where they are used; dp splits another dim, or none."""
    torch.manual_seed(0)
    model, x = Fused().double(), torch.randn(4, 5, 16, dtype=torch.float64)
    alone = copy.deepcopy(model)
    plan = Plan(dp=FullyShard("*"), tp={"qkv": ColwiseParallel(), "proj": RowwiseParallel()})
    ours = shardc.compile(model, plan, mesh=mesh)
    for seed in range(2):
        rows = x.roll(seed, 0)
        step(ours, rows.chunk(2)[mesh.get_local_rank("dp")])
        step(alone, rows)
        same_grads(ours, alone)
    over_tp = {c.kind for c in ours.programs[-1].collectives() if c.mesh_dim == "tp"}
    assert over_tp == {"all_reduce"}


def some_ranks_hold_nothing(rank: int, whole: Tensor) -> None:
    """Three rows over four ranks, in one message with rows that every rank has."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    ours, alone = shardc.compile(mlp(3), Plan(dp=FullyShard("net*")), mesh=mesh), mlp(3)
    for seed in range(2):
        step(ours, whole.roll(seed, 0).chunk(4)[rank])
        step(alone, whole.roll(seed, 0))
        same_grads(ours, alone)


def saved_and_loaded(mesh: Any, rows: Tensor, whole: Tensor, folder: str) -> None:
    """A dim that both split, `dp` named first: out into the plain module, and from there into another one."""
    plan = Plan(dp=FullyShard("net*"), tp=TP)
    ours, alone = shardc.compile(mlp(), plan, mesh=mesh), mlp()
    for one, x in ((ours, rows), (alone, whole)):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
        step(one, x)
        optimizer.step()
        shardc.save_checkpoint(f"{folder}/{type(one).__name__}", one, optimizer)
    torch.manual_seed(9)
    plain, other = MLP(8, 8).double(), shardc.compile(MLP(8, 8).double(), plan, mesh=mesh)
    for one, source in ((plain, ours), (other, alone)):
        optimizer = torch.optim.Adam(one.parameters())
        shardc.load_checkpoint(f"{folder}/{type(source).__name__}", one, optimizer)
        same(one, alone)
        one.zero_grad()
        step(one, rows if one is other else whole)
        optimizer.step()  # lr comes from the file
    same(other, plain)


def kept_by_two(rank: int) -> list[str]:
    """`reshard_after_forward=2` beside torch's, and over a part of a mesh dim beside another one."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    theirs = model()
    for layer in theirs.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh, reshard_after_forward=2)
    fully_shard(theirs, mesh=mesh, reshard_after_forward=2)
    ours = shardc.compile(model(), Plan(dp=FullyShard("layers.*", reshard_after_forward=2)), mesh=mesh)
    torch.testing.assert_close(*(torch.tensor(losses(m, rank, 4, 5)) for m in (ours, theirs)), **EXACT)
    same(ours, theirs, atol=1e-9)  # Adam enlarges what is left of a gradient of zero: the bias of keys
    return [c.mesh_dim for c in ours.programs[-1].collectives() if c.kind == "all_gather"]


def on_four(rank: int, folder: str) -> str:
    whole = torch.randn(4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    some_ranks_hold_nothing(rank, whole)
    assert kept_by_two(rank) == 3 * ["dp"] + 3 * ["dp/2"]
    names = ("dp", "tp")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    rows = whole.chunk(2)[mesh.get_local_rank("dp")]
    clipped(rank, mesh, Plan(dp=FullyShard("net*"), tp=TP), rows, whole)
    saved_and_loaded(mesh, rows, whole, folder)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "dp"))
    clipped(rank, hybrid, Plan(replica=Replicated(), dp=FullyShard("net*")), whole.chunk(4)[rank], whole)
    clipped(rank, mesh, Plan(dp=FullyShard("net*"), tp=TP), rows, whole, hidden=7)  # then another dim is split
    fused_heads_are_not_moved(rank, mesh)
    try:
        shardc.compile(mlp(7), Plan(dp=FullyShard("net*", placement=lambda p: Shard(0)), tp=TP), mesh=mesh)
    except PlanError as error:
        return str(error)
    return "not refused"


@on_ranks
def test_norms_over_two_mesh_dims_and_pieces_that_torch_cannot_name(tmp_path: Path):
    first, *others = run_ranks(on_four, 4, (str(tmp_path),))
    assert others == 3 * [first]
    lines = first.splitlines()
    assert lines[0] == (
        "plan error: net1.weight would be stored as [7@tp.dp, 8], and torch has no placements for such uneven pieces"
    )
    assert lines[1].startswith("  --> test_fully_shard.py:")
    assert lines[-1].startswith("   = help: list the mesh dims as tp, dp, or shard another dim")
