"""The scripts of examples/ run under torchrun, and train as one process does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.runtime.ranks import LIMIT, on_ranks

ROOT = Path(__file__).parents[2]
LOSS = re.compile(r"^step \d+ loss ([\d.]+)", re.M)


def torchrun(script: str, ranks: int, *options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / script), *options], capture_output=True, text=True, timeout=LIMIT / 2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_of_one_process(steps: int) -> list[float]:
    """What examples/from_ddp.py says, by plain torch: in one process the ranks' samplers, row after row."""
    from examples.from_ddp import GLOBAL_BATCH, data

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(data(), GLOBAL_BATCH, sampler=DistributedSampler(data(), 1, 0, seed=0, drop_last=True))
    out: list[float] = []
    for x, y in list(loader)[:steps]:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


@on_ranks
def test_a_ddp_script_trains_and_resumes_as_one_process(tmp_path):
    folder = ["--checkpoint", str(tmp_path / "state")]
    shown = torchrun("from_ddp.py", 2, "--steps", "3", *folder) + torchrun("from_ddp.py", 2, "--steps", "6", *folder)
    got = [float(loss) for loss in LOSS.findall(shown)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(losses_of_one_process(6)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@on_ranks
def test_a_llama_trains_alike_on_one_rank_and_on_four():
    pytest.importorskip("transformers")
    one, four = torchrun("hugging_face.py", 1), torchrun("hugging_face.py", 4, "--sharded")
    numbers = [[float(n) for n in re.findall(r"(?:loss|norm) ([\d.]+)", shown)] for shown in (one, four)]
    assert len(numbers[0]) == 6
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-4, atol=2e-5)
