"""Programs traced in one process and run in others (case 116): as compiled in place, or refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import shardc
from shardc import Mesh, Plan, PlanError, Replicated, ShardingError
from tests.acceptance.models import MLP, MLP_TP, TRANSFORMER_TP, Transformer
from tests.agree import traces_no_more
from tests.runtime.ranks import on_ranks, run_ranks

PLAN = Plan(dp=Replicated(), tp=TRANSFORMER_TP)
CLOSE = {"rtol": 2e-5, "atol": 1e-5}


def tokens() -> Tensor:
    return torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(1))


def built(kind: type[nn.Module] = Transformer) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.fixture
def four_ranks_that_are_not_there() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def run_what_was_saved(rank: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = built()
    alone, inplace = copy.deepcopy(model), shardc.compile(copy.deepcopy(model), PLAN, mesh=mesh)
    loaded = shardc.compile(model, PLAN, mesh=mesh)
    loaded.load_programs(path)
    ids = tokens()
    mine = ids[2 * mesh.get_local_rank("dp") :][:2]
    traces_no_more(loaded)
    out = loaded(mine)
    out.square().mean().backward()
    assert torch.equal(out, inplace(mine))
    inplace(mine).square().mean().backward()
    assert str(loaded.programs[0]) == str(inplace.programs[0])
    assert loaded.programs[0].collectives() == inplace.programs[0].collectives()
    assert loaded.programs[0].verify(ids) < 1e-5
    alone(ids).square().mean().backward()
    for (name, p), q, r in zip(loaded.named_parameters(), inplace.parameters(), alone.parameters(), strict=True):
        have, want = (g.full_tensor() if isinstance(g, DTensor) else g for g in (p.grad, q.grad))
        assert torch.equal(have, want), name  # pyright: ignore
        torch.testing.assert_close(have, r.grad, **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
    with pytest.raises(PlanError, match="holds programs for a mesh of dp=2, tp=2, and this one is tp=4"):
        line = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
        shardc.compile(built(), TRANSFORMER_TP, mesh=line).load_programs(path)


@on_ranks
def test_what_one_process_compiled_over_a_fake_group_runs_on_four(tmp_path: Path, four_ranks_that_are_not_there: None):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    compiled = shardc.compile(built(), PLAN, mesh=mesh)
    compiled.lower(tokens()[:2])
    compiled.save_programs(tmp_path / "programs.json")
    run_ranks(run_what_was_saved, 4, (str(tmp_path / "programs.json"),))


# --- on an abstract mesh


class ManySorts(nn.Module):
    """Nodes, results and arguments of many sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.table = torch.arange(8, dtype=torch.bfloat16)  # a constant of the program
        self.mask = torch.ones(8).expand(2, 8)

    def forward(self, x: Tensor, scale: float, *, how: str, also: dict[str, Any]) -> dict[str, Any]:
        h = self.norm(self.lin(x)) * scale + self.table + self.mask[0]
        h = F.gelu(h, approximate=how) + also["y"].to(torch.complex64).real
        first, rest = h.split([3, 5], 1)
        return {"first": first, "many": (rest[..., 1:], None, 3), "inf": h.masked_fill(h > 0, -float("inf")).amax()}


def calls(model: Any) -> list[Any]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    out = model(x, 0.5, how="tanh", also={"y": x[:, :1]})
    loss = out["first"].sum() + out["many"][0].square().sum()
    loss.backward()
    return [out["first"], out["many"][0], out["inf"], *(p.grad for p in model.parameters()), *model.buffers()]


def compiled_with(plan: Any = None, make: type[nn.Module] = ManySorts, **options: Any) -> shardc.CompiledModule:
    return shardc.compile(built(make), plan or {"lin": ColwiseParallel()}, mesh=Mesh(tp=2), **options)


@cache
def content_of_a_file() -> bytes:
    compiled = compiled_with()
    calls(compiled)
    with TemporaryDirectory() as folder:
        compiled.save_programs(Path(folder) / "p.json")
        return (Path(folder) / "p.json").read_bytes()


def saved(path: Path) -> Path:
    path.write_bytes(content_of_a_file())
    return path


def test_a_loaded_program_computes_what_the_saved_one_does(tmp_path: Path):
    path = saved(tmp_path / "p.json")
    fresh, loaded = compiled_with(), compiled_with()
    loaded.load_programs(path)
    traces_no_more(loaded)
    found = calls(loaded)
    for have, want in zip(found, calls(fresh), strict=True):
        assert torch.equal(have, want)
    assert str(loaded.programs[0]) == str(fresh.programs[0])
    assert loaded.programs[0].stage("TRACED") == fresh.programs[0].stage("TRACED")
    assert [c.where for c in loaded.programs[0].collectives()] == [c.where for c in fresh.programs[0].collectives()]


def test_another_call_is_traced_as_ever_and_saved_beside_the_first(tmp_path: Path):
    loaded = compiled_with()
    loaded.load_programs(saved(tmp_path / "p.json"))
    loaded.eval()
    calls(loaded)
    loaded.save_programs(tmp_path / "both.json")
    again = compiled_with()
    again.load_programs(tmp_path / "both.json")
    traces_no_more(again)
    calls(again)
    calls(again.eval())


class Wider(ManySorts):
    """Its class is another, and of equal parts."""


def test_what_was_saved_for_something_else_is_refused(tmp_path: Path):
    path = saved(tmp_path / "p.json")
    other = built(ManySorts)
    other.norm.eps = 0.1  # pyright: ignore
    refused = {
        "p.json was saved under another plan": compiled_with({"lin.weight": torch.distributed.tensor.Shard(1)}),
        "module is another": compiled_with(make=Wider),
        "module norm is another": shardc.compile(other, {"lin": ColwiseParallel()}, mesh=Mesh(tp=2)),
        "strict was False and is True": compiled_with(strict=True),
        "p.json holds programs for a mesh of tp=2, and this one is tp=4": shardc.compile(
            built(ManySorts), {"lin": ColwiseParallel()}, mesh=Mesh(tp=4)
        ),
    }
    for message, compiled in refused.items():
        with pytest.raises(PlanError) as caught:
            compiled.load_programs(path)
        assert message in str(caught.value)
        assert "test_saved_programs.py:" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        compiled_with().load_programs(tmp_path / "nowhere.json")


def test_a_damaged_file_is_refused(tmp_path: Path):
    text = saved(tmp_path / "p.json").read_text()
    content = json.loads(text)
    content["format"] = "shardc programs 0"
    wrong = {
        "cut": text[: len(text) // 2],
        "changed": text.replace("0.5", "0.25"),
        "list": "[1, 2]",
        "old": json.dumps(content),
        "empty": "",
    }
    for name, damaged in wrong.items():
        (tmp_path / name).write_text(damaged)
        with pytest.raises(PlanError, match=f"{name} "):
            compiled_with().load_programs(tmp_path / name)


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with its content changed, and a digest that fits."""
    content = json.loads(path.read_text())
    content.pop("digest")
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "digest": digest}))
    return path


def in_its_text(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        (trace,) = content["traces"].values()
        assert any(old in line for line in trace["text"])
        trace["text"] = [line.replace(old, new) for line in trace["text"]]

    return change


def emptied(content: dict[str, Any]) -> None:
    (trace,) = content["traces"].values()
    trace["tensors"] = dict.fromkeys(trace["tensors"], "AAAA")


FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "an operator that is none": in_its_text("aten.gelu", "os.system"),
    "a name that is code": in_its_text("%gelu: ", "%gelu=__import__('os'): "),
    "a type that pytrees import": in_its_text("builtins.dict", "collections.defaultdict', ['os', 'system"),
    "deep lists": in_its_text("aten.gelu(", f"aten.gelu({'[' * 9999}"),
    "a huge number": in_its_text("aten.gelu(", f"aten.gelu({'9' * 99999}"),
    "a huge size": in_its_text("f32[4, 8]", f"f32[{'9' * 18}, {'9' * 18}]"),
    "constants of other sizes": emptied,
    "a trace of another form": lambda content: content["traces"].update(dict.fromkeys(content["traces"], [[1]])),
    "a plan of another form": lambda content: content["about"].update(plan=[3]),
    "nothing": lambda content: content.clear(),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused_and_runs_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("it ran"))
    loaded = compiled_with()
    with pytest.raises(PlanError):
        loaded.load_programs(forged(saved(tmp_path / "p.json"), FORGED[kind]))
        calls(loaded)


def test_files_that_are_hard_to_parse_are_refused(tmp_path: Path):
    path = tmp_path / "p.json"
    for text in ("[" * 200_000, '{"a":' * 200_000, "9" * 200_000, '"' + "x" * (200 << 20) + '"'):
        path.write_text(text)
        with pytest.raises(PlanError, match="p.json"):
            compiled_with().load_programs(path)


def test_a_program_other_than_the_one_promised_is_refused(tmp_path: Path):
    """The plan's report says nothing of options at the root's border; the program's hash does."""
    path = saved(tmp_path / "p.json")
    other = compiled_with(outputs=torch.distributed.tensor.Shard(0))
    other.load_programs(path)
    with pytest.raises(PlanError, match="is not the one that was saved"):
        calls(other)


class Bag(NamedTuple):
    x: Tensor


class ReturnsABag(MLP):
    def forward(self, x: Tensor) -> Any:
        return Bag(super().forward(x))


def test_what_cannot_be_written_as_data_is_refused(tmp_path: Path):
    compiled = shardc.compile(ReturnsABag(), MLP_TP, mesh=Mesh(tp=2))
    compiled(torch.randn(2, 16))
    with pytest.raises(ShardingError, match="inputs or results cannot be saved: .*Bag"):
        compiled.save_programs(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())
