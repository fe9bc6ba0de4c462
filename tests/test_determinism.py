"""One program, one text: whatever the hash seed, the process, or what was compiled before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from tests.acceptance.models import Transformer

ROOT = Path(__file__).parents[1]
DP = {"replicated": shardc.Replicated(bucket_mb=0.002), "fully sharded": shardc.FullyShard("layers.*")}
TP = {
    "layers.*.attn.[qkv]": ColwiseParallel(),
    "layers.*.attn.proj": RowwiseParallel(),
    "layers.*.up": ColwiseParallel(),
    "layers.*.down": RowwiseParallel(),
}


def program(name: str) -> str:
    """The text of a small transformer's program after every pass."""
    model = shardc.compile(Transformer(layers=2), shardc.Plan(dp=DP[name], tp=TP), mesh=shardc.Mesh(dp=2, tp=2))
    lowered = model.lower(torch.randint(16, (4, 5)))
    return "\n".join([*(record.after for record in lowered.records), lowered.hash])


def in_a_process(seed: int) -> subprocess.Popen[str]:
    code = "from tests.test_determinism import DP, program\nfor name in DP: print(program(name))"
    env = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_text_does_not_depend_on_the_hash_seed():
    running = [in_a_process(seed) for seed in (0, 1, 4242)]
    texts = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "shardc.start([" in texts[0] and "shardc.reduce_scatter(" in texts[0]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_the_text_does_not_depend_on_what_was_compiled_before():
    assert program("replicated") == program("replicated")
