"""Operations counted in a program against torch's own counter over eager, results that are None included."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import shardc
from shardc.compiler.ir.flops import FORMULAS, flops


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(4, 6, 2, 4).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q)


def convolution(**options) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, **options), nn.Flatten(1))


MODELS = {
    "linear": (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), (4, 8)),
    "attention": (Attention(), (4, 6, 8)),
    "convolution": (convolution(), (4, 2, 6, 6)),
    "convolution without bias": (convolution(bias=False, stride=2), (4, 2, 6, 6)),
    "convolution in groups": (convolution(groups=2), (4, 2, 6, 6)),
    "transposed": (nn.ConvTranspose1d(2, 4, 3), (4, 2, 6)),
}


@pytest.mark.parametrize("learns", ["all", "the input too", "the bias alone"])
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_ranks_share_the_operations_of_one_device(name: str, learns: str):
    model, shape = MODELS[name]
    model, x = copy.deepcopy(model), torch.randn(shape, requires_grad=learns == "the input too")
    if learns == "the bias alone":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        if not any(p.requires_grad for p in model.parameters()):
            return
    lacking = {op: partial(FORMULAS[op]) for op in FORMULAS.keys() - flop_registry.keys()}  # attention on a CPU
    for formula in lacking.values():
        formula._get_raw = True  # torch's word for a formula that takes tensors, not their shapes
    with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        copy.deepcopy(model)(x).sum().backward()
    compiled = shardc.compile(model, shardc.Replicated(), mesh=shardc.Mesh(dp=2))
    program = compiled.lower(x)
    assert 2 * sum(flops(n, program.mesh) for n in program.gm.graph.nodes) == counter.get_total_flops()
