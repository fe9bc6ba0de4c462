"""A fixed slice of the sweep over torch's own test database: nothing wrong, nothing crashed, and checks that raise."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardc

ROOT = Path(__file__).parents[1]
SLICE = ("add", "gather", "istft", "linalg.inv", "linalg.solve", "mm", "nn.functional.mse_loss", "ones", "scatter_add")


@pytest.mark.slow
def test_a_slice_of_the_sweep_is_right(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks/operators/op_coverage.py"), "--samples", "2", "--layouts", "4"]
    command += ["--ops", ",".join(SLICE), "--json", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SLICE}
    assert {name: result["shardc"]["problems"] for name, result in found.items()} == dict.fromkeys(SLICE, [])
    assert all(result["layouts"] > 0 for result in found.values())


def _sharded_op() -> Any:
    spec = importlib.util.spec_from_file_location("sharded_op", ROOT / "benchmarks/operators/sharded_op.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def test_rounding_is_told_from_a_fault_by_float64():
    """A running sum near 10,000 in another order is rounded otherwise; one that lacks a number is wrong."""
    ours = _sharded_op()
    x = torch.full((4001,), 1e-4).index_fill(0, torch.tensor(0), 1e4).requires_grad_()
    case = ours.Case(lambda t: t.cumsum(0) - 1e4, ((ours.Slot(0),), {}), (x,))
    want, exact = case.alone(False), case.exact(False)
    near = ours.Result([want.outputs[0] * (1 - 1e-3)], want.gradients)
    lacking = ours.Result([exact.outputs[0].float() - 1], want.gradients)
    assert ours.compared(near, want) and ours.as_exact(near, want, exact)
    assert ours.compared(lacking, want) and not ours.as_exact(lacking, want, exact)
    assert not ours.as_exact(near, want, None)
    whole = ours.Result([torch.ones(2, dtype=torch.int64)], [])
    assert not ours.as_exact(ours.Result([torch.zeros(2, dtype=torch.int64)], []), whole, whole)


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
