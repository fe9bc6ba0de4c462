"""Nothing that a checkpoint's files name is run, and nothing outside of its folder is read."""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardc
from shardc import CheckpointError, Mesh

RAN = "ran"  # the file that the code in a checkpoint makes


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, (RAN,)


class Noted(nn.Linear):
    """Has a value beside its tensors."""

    note: Any = "plain"

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def saved(folder: Path, note: Any = "plain", groups: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Noted(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {f"optim.0.{n}.{k}": x for n, p in model.named_parameters() for k, x in optimizer.state[p].items()}
    groups = [{**optimizer.param_groups[0], "params": ["weight", "bias"]}] if groups is None else groups
    state |= {
        **model.state_dict(),
        "_extra_state": note,
        "optim.0.groups": pickle.dumps({"groups": groups, "steps": 1}),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return model, optimizer


def in_metadata(folder: Path) -> None:
    saved(folder)
    held = pickle.loads((folder / ".metadata").read_bytes())
    held.planner_data = Code()
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def in_metadata_under_its_checksum(folder: Path) -> None:
    in_metadata(folder)
    held = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(held + f"crc32:{zlib.crc32(held):08x}".encode())


def in_groups(folder: Path) -> None:
    saved(folder, groups=Code())


def in_extra_state(folder: Path) -> None:
    saved(folder, note=Code())


def outside(folder: Path) -> None:
    saved(folder)
    (folder.parent / "secret").write_bytes(next(folder.glob("*.distcp")).read_bytes())
    held = pickle.loads((folder / ".metadata").read_bytes())
    for info in held.storage_data.values():
        info.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def linked(folder: Path) -> None:
    saved(folder)
    file = next(folder.glob("*.distcp"))
    file.rename(folder.parent / "secret")
    file.symlink_to(folder.parent / "secret")


@pytest.mark.parametrize(
    "attack", [in_metadata, in_metadata_under_its_checksum, in_groups, in_extra_state, outside, linked]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_hostile_folder_is_refused(attack: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    attack(tmp_path / "folder")
    model = Noted(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError):
        shardc.load_checkpoint("folder", model, torch.optim.AdamW(model.parameters()))
    assert not Path(RAN).exists() and torch.equal(model.weight, before)
    if attack not in (in_groups, in_extra_state):  # which init does not read
        with pytest.raises(CheckpointError):
            shardc.compile(nn.Linear(2, 2, device="meta"), {}, mesh=Mesh(tp=2), init="folder")
        assert not Path(RAN).exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_torch_wrote_and_plain_values_are_read(tmp_path: Path):
    model, _ = saved(tmp_path / "folder", note=[1, "two", torch.ones(2)])
    other = Noted(2, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    shardc.load_checkpoint(tmp_path / "folder", other, optimizer, strict=False)
    assert torch.equal(other.weight, model.weight) and optimizer.state[other.weight]["step"] == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_who_trusts_a_file_may_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    in_extra_state(tmp_path / "folder")
    shardc.load_checkpoint("folder", Noted(2, 2), strict=False, allow_pickle=True)
    assert Path(RAN).exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_reads_what_we_wrote(tmp_path: Path):
    model = nn.Linear(2, 2)
    shardc.save_checkpoint(tmp_path / "folder", model)
    state = {k: torch.empty_like(x) for k, x in model.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    assert torch.equal(state["weight"], model.weight)


def test_groups_that_are_no_plain_values_are_refused_when_they_are_saved(tmp_path: Path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["schedule"] = BytesIO
    with pytest.raises(CheckpointError, match="no plain value"):
        shardc.save_checkpoint(tmp_path / "folder", model, optimizer)
