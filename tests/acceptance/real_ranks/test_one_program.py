"""The program that is proved on an abstract mesh is the one that real ranks run, to the letter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardc
from shardc import FullyShard, Mesh, Plan, Replicated
from tests.acceptance.models import TRANSFORMER_TP, Transformer
from tests.runtime.ranks import on_ranks, run_ranks

IDS = torch.arange(32).view(8, 4) % 8
PLANS: dict[str, tuple[dict[str, int], Any]] = {
    "DP": ({"dp": 4}, Plan(dp=Replicated())),
    "DP, some of it ignored": ({"dp": 4}, Plan(dp=Replicated(ignored_modules="layers.0"))),
    "FSDP": ({"dp": 4}, Plan(dp=FullyShard("layers.*"))),
    "TP": ({"tp": 4}, Plan(tp=TRANSFORMER_TP)),
    "FSDP+TP": ({"dp": 2, "tp": 2}, Plan(dp=FullyShard("layers.*"), tp=TRANSFORMER_TP)),
}


def hashes(rank: int | None) -> dict[str, str]:
    """Of the program under each plan; without a rank all are simulated."""
    found, meshes = {}, {}
    for name, (sizes, plan) in PLANS.items():
        torch.manual_seed(0)
        model: nn.Module = Transformer(layers=1)
        if rank is None:
            compiled, ids = shardc.compile(model, plan, mesh=Mesh(**sizes)), IDS
        else:
            key = tuple(sizes.items())
            meshes[key] = meshes.get(key) or init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=(*sizes,))
            compiled, ids = shardc.compile(model, plan, mesh=meshes[key]), IDS[: 8 // sizes.get("dp", 1)]
        found[name] = compiled.lower(ids).hash
    return found


@on_ranks
def test_a_program_is_the_same_simulated_and_on_real_ranks():
    simulated = hashes(None)
    assert run_ranks(hashes, 4) == [simulated] * 4
    assert len({*simulated.values()}) == len(PLANS)
