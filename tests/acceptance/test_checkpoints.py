"""Checkpoints: out of one layout into another, with the optimizer; what is damaged or does not fit changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import FullyShard, Mesh
from tests.acceptance.test_meta_init import Small

Pair = tuple[nn.Module, torch.optim.Optimizer]


def pair(model: nn.Module) -> Pair:
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    """One step on the same global batch for any layout of ranks: all of them pass all rows."""
    ids = torch.randint(13, (4, 4), generator=torch.Generator().manual_seed(seed))
    loss = model(ids).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def layouts(mesh: Any) -> dict[str, Callable[[], Pair]]:
    return {
        "plain": lambda: pair(Small()),
        "abstract": lambda: pair(shardc.compile(Small(), FullyShard(), mesh=mesh)),
    }


def test_any_layout_into_any_other(tmp_path: Path):
    """Next losses are equal: the plain module, and simulated ranks."""
    made = {name: make for name, make in layouts(Mesh(dp=2)).items() if name in ("plain", "abstract")}
    for source, make in made.items():
        one = make()
        step(*one, 1)
        shardc.save_checkpoint(tmp_path / source, *one)
        want = step(*one, 2), step(*one, 3)
        for remake in made.values():
            other = remake()
            shardc.load_checkpoint(tmp_path / source, *other)
            torch.testing.assert_close((step(*other, 2), step(*other, 3)), want)


def test_a_save_that_is_killed_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = pair(nn.Linear(3, 3))
    kept = one[0].weight.detach().clone()  # pyright: ignore
    shardc.save_checkpoint(tmp_path, *one)
    nn.init.zeros_(one[0].weight)  # pyright: ignore

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    for where in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, where, killed)
            with pytest.raises(BaseException):  # noqa: B017  (however torch wraps it)
                shardc.save_checkpoint(tmp_path, *one)
        shardc.load_checkpoint(tmp_path, other := nn.Linear(3, 3))
        assert torch.equal(other.weight, kept)


def test_background(tmp_path: Path):
    model = nn.Linear(3, 3)
    kept = model.weight.detach().clone()
    future = shardc.save_checkpoint(tmp_path, model, background=True)
    nn.init.zeros_(model.weight)
    assert future is not None
    future.result()
    shardc.load_checkpoint(tmp_path, model)
    assert torch.equal(model.weight, kept)


def test_what_does_not_fit_changes_nothing(tmp_path: Path):
    shardc.save_checkpoint(tmp_path, nn.Linear(3, 3))
    other = nn.Linear(3, 4)
    before = other.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight: \(3, 3\) there, \(4, 3\) here"):
        shardc.load_checkpoint(tmp_path, other)
    with pytest.raises(ValueError, match="bias: not here"):
        shardc.load_checkpoint(tmp_path, nn.Linear(3, 3, bias=False))
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        shardc.load_checkpoint(tmp_path, nn.Linear(3, 3))
    assert torch.equal(other.weight, before)
