"""A fixed slice of the sweep over torch's own test database: nothing wrong, nothing crashed, and checks that raise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardc

ROOT = Path(__file__).parents[1]
SLICE = ("add", "gather", "istft", "linalg.inv", "linalg.solve", "mm", "nn.functional.mse_loss", "ones", "scatter_add")


@pytest.mark.slow
def test_a_slice_of_the_sweep_is_right(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks/op_coverage.py"), "--samples", "2", "--layouts", "4"]
    command += ["--ops", ",".join(SLICE), "--json", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SLICE}
    assert {name: result["shardc"]["problems"] for name, result in found.items()} == dict.fromkeys(SLICE, [])
    assert all(result["layouts"] > 0 for result in found.values())


class Inverse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x)


@pytest.mark.filterwarnings("ignore:.*plan is empty")
def test_a_singular_matrix_raises_as_on_one_device():
    compiled = shardc.compile(Inverse(), mesh=shardc.Mesh(tp=2), inputs=(Shard(0),))
    eye = torch.eye(3).repeat(4, 1, 1)
    torch.testing.assert_close(compiled(eye), eye)
    eye[2, 1] = 0
    with pytest.raises(RuntimeError, match="linalg.inv.*singular"):
        compiled(eye)


class Ones(nn.Module):
    def forward(self) -> torch.Tensor:
        return torch.ones(3)


@pytest.mark.filterwarnings("ignore:.*plan is empty")
def test_forward_may_take_nothing():
    compiled = shardc.compile(Ones(), mesh=shardc.Mesh(tp=2))
    assert torch.equal(compiled(), torch.ones(3))
