"""Checkpoints: out of one layout into another, with the optimizer; what is damaged or does not fit changes nothing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import CheckpointError, FullyShard, Mesh, Plan, Replicated
from tests.runtime.ranks import on_ranks, run_ranks

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
ADAM = functools.partial(torch.optim.Adam, lr=0.01)


class Sample(nn.Module):
    """Sizes that 2 does not divide, a fused q, k, v, a tied weight, a frozen one, a scalar, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Embedding(13, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 3), nn.Linear(3, 8), nn.Linear(8, 13, bias=False)
        self.scale, self.stats = nn.Parameter(torch.tensor(0.5)), nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight
        self.up.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (2, 4)) for y in self.qkv(x).chunk(3, -1))
        x = x + self.proj(((q * k).softmax(-1) * v).flatten(-2))
        return self.head(self.stats(x + self.down(self.up(x).relu()) * self.scale))


def sample(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Sample().double()


def batch(seed: int) -> Tensor:
    return torch.randint(13, (4, 4), generator=torch.Generator().manual_seed(seed))


def square(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().mean()


class Layout:
    """A model and an optimizer in some layout, and the loss of a step on the same global batch."""

    def __init__(self, *objects: Any, part: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.objects, self.part = objects, part

    def step(self, seed: int) -> Tensor:
        ids = self.part(batch(seed))
        if len(self.objects) == 1:
            return self.objects[0](ids)
        model, optimizer = self.objects
        loss = square(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach().clone()
        if ids.shape[0] != 4:
            dist.all_reduce(loss)
            loss /= 2
        return loss


def alone(seed: int = 0) -> Layout:
    return with_adam(sample(seed))


def with_adam(model: nn.Module, **options: Any) -> Layout:
    return Layout(model, ADAM([p for p in model.parameters() if p.requires_grad]), **options)


TP = {"qkv": ColwiseParallel(), "proj": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
HYBRID = Plan(replica=Replicated(), dp=FullyShard("qkv", "up", "down"))


def last(p: Tensor) -> Shard:
    return Shard(p.dim() - 1)


def simulated(every: bool) -> dict[str, Layout]:
    made = {"plain": alone(1)}
    if every:
        step = shardc.train_step(sample(3), Plan(dp=FullyShard(), tp=TP), square, ADAM, mesh=Mesh(dp=2, tp=2))
        made["stepped"] = Layout(step)
        made["hybrid"] = with_adam(shardc.compile(sample(2), HYBRID, mesh=Mesh(replica=2, dp=2)))
    return made


def real(rank: int, every: bool) -> dict[str, Layout]:
    dp = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    tp = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    def mine(x: Tensor) -> Tensor:
        return x.chunk(2)[rank]

    units = FullyShard("qkv", "up", "down")
    made = {
        "units": with_adam(shardc.compile(sample(4), Plan(dp=units), mesh=dp), part=mine),
        "columns": with_adam(shardc.compile(sample(5), Plan(dp=FullyShard(placement=last)), mesh=dp), part=mine),
        "step of tensors": Layout(shardc.train_step(sample(8), Plan(tp=TP), square, ADAM, mesh=tp)),
        "tensors": with_adam(shardc.compile(sample(6), Plan(tp=TP), mesh=tp)),
    }
    if every:
        made["step of units"] = Layout(shardc.train_step(sample(7), Plan(dp=units), square, ADAM, mesh=dp), part=mine)
    return made


def pairs(made: dict[str, Layout], folder: Path, targets: Callable[[str], list[str]]) -> dict[str, Any]:
    """Out of each into others: their next losses are its own."""
    wanted = {}
    for source, one in made.items():
        one.step(1)
        shardc.save_checkpoint(folder / source, *one.objects)
        wanted[source] = [float(one.step(2)), float(one.step(3))]
        for target in targets(source):
            other = made[target]
            shardc.load_checkpoint(folder / source, *other.objects)
            got = [float(other.step(2)), float(other.step(3))]
            torch.testing.assert_close(got, wanted[source], **EXACT, msg=lambda t, d=(source, target): f"{d}: {t}")
    return wanted


def on_two(rank: int, folder: str, every: bool) -> dict[str, Any]:
    made = real(rank, every) | simulated(every)
    names = list(made)

    def targets(source: str) -> list[str]:
        at = names.index(source)
        return names if every else [names[(at + k) % len(names)] for k in (1, 2, 0)]

    wanted = pairs(made, Path(folder), targets)
    in_the_background(made["units"], made["tensors"], Path(folder) / "background")
    into_meta(made["tensors"], Path(folder) / "tensors", wanted["tensors"])
    damaged(rank, made["units"], Path(folder) / "columns")
    return wanted


def in_the_background(one: Layout, other: Layout, folder: Path) -> None:
    want = torch.empty(0)
    for _ in range(2):  # the second save replaces the first
        future = shardc.save_checkpoint(folder, *one.objects, background=True)
        want = one.step(2)  # changes what is being saved
        assert future is not None
        future.result()
    dist.barrier()
    shardc.load_checkpoint(folder, *other.objects)
    torch.testing.assert_close(other.step(2), want, **EXACT)


def into_meta(like: Layout, folder: Path, want: list[float]) -> None:
    """A model that never had values gets them from the files, and no rank more than its part."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = Sample().double()
    step = shardc.train_step(model, Plan(tp=TP), square, ADAM, mesh=mesh, init={})
    shardc.load_checkpoint(folder, step)
    got = [float(step(batch(2))), float(step(batch(3)))]
    torch.testing.assert_close(got, want, **EXACT)


def damaged(rank: int, one: Layout, folder: Path) -> None:
    """Every rank refuses what one of them cannot read, and nothing is changed on any."""
    dist.barrier()
    file = sorted(folder.glob("*_1_0.distcp"))[0]  # of the second rank
    if rank == 0:
        held = file.read_bytes()
        file.write_bytes(held[: len(held) - 3000])
    dist.barrier()
    before = [x.clone() for x in one.objects[0].full_state_dict().values()]
    with pytest.raises(CheckpointError, match=rf"\w+ in .*{file.name} cannot be read"):
        shardc.load_checkpoint(folder, *one.objects)
    torch.testing.assert_close(list(one.objects[0].full_state_dict().values()), before, rtol=0, atol=0)


def check_alone(folder: Path, wanted: dict[str, Any]) -> None:
    """What ranks have written is read by one process into the plain module, strictly."""
    for source, want in wanted.items():
        if source != "columns":  # which was damaged
            one = alone()
            shardc.load_checkpoint(folder / source, *one.objects)
            torch.testing.assert_close([float(one.step(2)), float(one.step(3))], want, **EXACT)


@on_ranks
def test_any_layout_into_any_other_on_ranks(tmp_path: Path):
    """SHARDC_ALL_PAIRS=1 for every pair of eight layouts, simulated ones among them."""
    every = bool(os.environ.get("SHARDC_ALL_PAIRS"))
    first, second = run_ranks(on_two, 2, (str(tmp_path), every))
    assert first == second and len(first) == (8 if every else 5)
    check_alone(tmp_path, first)


# --- killed


def dying(calls: int) -> None:
    """From here on this process ends at its calls-th call of the file system."""
    left = calls

    def watch(frame: Any, event: str, arg: Any) -> None:
        nonlocal left
        name = getattr(arg, "__name__", "")
        if event == "c_call" and name in ("write", "fsync", "flush", "close", "rename", "replace", "unlink", "open"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)


def zeroed(model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.zeros_(p)


def save_and_die(folder: Path, calls: int) -> None:
    one = alone()
    zeroed(one.objects[0])
    dying(calls)
    shardc.save_checkpoint(folder, *one.objects)
    sys.setprofile(None)


def test_a_save_that_is_killed_leaves_the_last_one(tmp_path: Path):
    """Killed for good, at every so many of its calls of the file system, until it comes through."""
    one = alone()
    one.step(1)
    shardc.save_checkpoint(tmp_path, *one.objects)
    kept, fork = one.objects[0].get_parameter("up.bias").detach().clone(), multiprocessing.get_context("fork")
    ends = []
    for calls in range(0, 1000, 19):
        child = fork.Process(target=save_and_die, args=(tmp_path, calls))
        child.start()
        child.join()
        other = alone(4)
        if not calls % 38 or child.exitcode == 0:
            shardc.load_checkpoint(tmp_path, other.objects[0])
            bias = other.objects[0].up.bias
            ends.append((child.exitcode, torch.equal(bias, kept), not bias.any()))
        if child.exitcode == 0:
            break
    assert ends[0] == (-signal.SIGKILL, True, False)
    assert ends[-1] == (0, False, True)
    assert all(old != new for _, old, new in ends) and len(ends) > 4
    assert len(list(tmp_path.glob("*.distcp"))) == 1  # what was left over is gone


TOLD = 7  # the exit code of a rank that was told


def save_with_a_rank_that_dies(rank: int, dies: int, calls: int, store: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = sample(0)
    zeroed(model)
    compiled = shardc.compile(model, FullyShard("qkv", "up"), mesh=mesh)
    if rank == dies:
        dying(calls)
    code = 0
    try:
        shardc.save_checkpoint(folder, compiled)
        sys.setprofile(None)
        dist.barrier()
    except (Exception, dcp.CheckpointException):  # torch's own is no Exception
        code = TOLD
    os._exit(code)


@on_ranks
def test_a_rank_that_is_killed_while_saving(tmp_path: Path):
    """Either rank, at several moments: the other is told and does not wait, and what stands in the folder is whole."""
    fork, ends = multiprocessing.get_context("fork"), []
    folder = tmp_path / "saved"
    first = shardc.compile(sample(1), FullyShard("qkv", "up"), mesh=Mesh(dp=2))  # what it imports, forks have
    shardc.save_checkpoint(folder, first)
    kept = first.get_parameter("up.bias").detach().clone()
    for dies, calls in ((1, 0), (0, 20), (1, 60), (0, 100), (1, 1000)):
        store = tmp_path / f"store{calls}"
        args = [(rank, dies, calls, store, folder) for rank in range(2)]
        ranks = [fork.Process(target=save_with_a_rank_that_dies, args=of) for of in args]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(15)  # less than the process group's own timeout
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        other = sample(4)
        shardc.load_checkpoint(folder, other)
        bias = other.get_parameter("up.bias")
        ends.append((codes[dies], codes[1 - dies], torch.equal(bias, kept), not bias.any()))
    assert ends == 4 * [(-signal.SIGKILL, TOLD, True, False)] + [(0, 0, False, True)]


def test_background(tmp_path: Path):
    model = nn.Linear(3, 3)
    kept = model.weight.detach().clone()
    future = shardc.save_checkpoint(tmp_path, model, background=True)
    nn.init.zeros_(model.weight)
    assert future is not None
    future.result()
    shardc.load_checkpoint(tmp_path, model)
    assert torch.equal(model.weight, kept)


# --- refused


def test_what_does_not_fit_changes_nothing(tmp_path: Path):
    shardc.save_checkpoint(tmp_path, nn.Linear(3, 3))
    other = nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match=r"weight: \(3, 3\) there, \(4, 3\) here"):
        shardc.load_checkpoint(tmp_path, other)
    with pytest.raises(CheckpointError, match="bias: not here"):
        shardc.load_checkpoint(tmp_path, nn.Linear(3, 3, bias=False))
    with pytest.raises(CheckpointError, match="holds no state of optimizer 0"):
        shardc.load_checkpoint(tmp_path, other := nn.Linear(3, 3), ADAM(other.parameters()))
    with pytest.raises(CheckpointError, match="parameters of no module"):
        shardc.save_checkpoint(tmp_path, ADAM(nn.Linear(3, 3).parameters()))
    with pytest.raises(CheckpointError, match="a dict is nothing to checkpoint"):
        shardc.save_checkpoint(tmp_path, {})
    with pytest.raises(CheckpointError, match="two modules have a weight"):
        shardc.save_checkpoint(tmp_path, nn.Linear(3, 3), nn.Linear(3, 3))


def test_an_optimizer_that_does_not_fit_leaves_the_model_as_it_is(tmp_path: Path):
    one = alone()
    one.step(1)
    shardc.save_checkpoint(tmp_path, *one.objects)
    model = sample(5)
    before = [x.clone() for x in model.state_dict().values()]
    qkv = model.get_submodule("qkv").parameters()
    grouped = torch.optim.Adam([{"params": [model.get_parameter("up.bias")]}, {"params": qkv}])
    with pytest.raises(CheckpointError, match=r"optim\.0\.\w+\.\w+ in .* is of no parameter of optimizer 0"):
        shardc.load_checkpoint(tmp_path, model, grouped)
    trains = [p for p in model.parameters() if p.requires_grad]
    grouped = torch.optim.Adam([{"params": trains[:2]}, {"params": trains[2:]}])
    with pytest.raises(CheckpointError, match="other groups of parameters"):
        shardc.load_checkpoint(tmp_path, model, grouped)
    torch.testing.assert_close(list(model.state_dict().values()), before, rtol=0, atol=0)


def test_bytes_that_are_not_as_written_are_refused(tmp_path: Path):
    """One bit of any value, of its place, or of the table of contents; and files that are gone."""
    one = alone()
    one.step(1)
    shardc.save_checkpoint(tmp_path, *one.objects)
    (file,) = tmp_path.glob("*.distcp")
    table = tmp_path / ".metadata"
    with table.open("rb") as stream:
        places = {index.fqn: info for index, info in pickle.load(stream).storage_data.items()}
    other = alone(6)
    before = [x.clone() for x in other.objects[0].state_dict().values()]

    def refused(changed: Path, held: bytes, says: str) -> None:
        whole = changed.read_bytes()
        changed.write_bytes(held) if held else changed.unlink()
        with pytest.raises(CheckpointError, match=says):
            shardc.load_checkpoint(tmp_path, *other.objects)
        changed.write_bytes(whole)

    for key in ("qkv.weight", "scale", "optim.0.qkv.weight.exp_avg", "stats.running_var"):
        where = places[key].offset + file.read_bytes()[places[key].offset :].index(value_of(one, key))
        refused(file, flipped(file, where), f"{key} in .*{file.name} cannot be read: a checksum is wrong")
    refused(file, file.read_bytes()[:-100], f"{list(places)[-1]} in .*{file.name} cannot be read: the file is cut off")
    refused(file, b"", f" in .*{file.name} cannot be read: No such file")
    size = len(table.read_bytes())
    for at in range(0, size, size // 15):
        refused(table, flipped(table, at), r"\.metadata cannot be read")
    torch.testing.assert_close(list(other.objects[0].state_dict().values()), before, rtol=0, atol=0)
    shardc.load_checkpoint(tmp_path, *other.objects)


def value_of(one: Layout, key: str) -> bytes:
    model, optimizer = one.objects
    if key.startswith("optim"):
        name, part = key.removeprefix("optim.0.").rsplit(".", 1)
        return optimizer.state[model.get_parameter(name)][part].numpy().tobytes()
    return model.state_dict()[key].numpy().tobytes()


def flipped(file: Path, at: int) -> bytes:
    held = bytearray(file.read_bytes())
    held[at] ^= 0x10
    return bytes(held)
