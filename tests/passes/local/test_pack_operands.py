"""Goldens of passes/local/pack_operands.py. EXPECTTEST_ACCEPT=1 rewrites."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardc
from shardc import Mesh


class Net(nn.Module):
    def __init__(self, does: Callable[[Net, Tensor], Tensor], form: torch.memory_format) -> None:
        super().__init__()
        self.does, self.conv, self.norm, self.fc = does, nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 4)
        self.to(memory_format=form)

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def packed(does: Callable[[Net, Tensor], Tensor], form: torch.memory_format = torch.channels_last) -> str:
    """The lines that the pass made."""
    x = torch.randn(2, 2, 4, 4).contiguous(memory_format=form)
    net = Net(does, form)
    with torch.no_grad():
        program = shardc.compile(net, {"conv.weight": Shard(0)}, mesh=Mesh(tp=2)).lower(x)
    return "\n".join(x for x in str(program).splitlines() if "# pack-operands" in x)


def attend(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h, h)


def test_what_a_gather_gives_is_packed():
    assert_expected_inline(
        packed(lambda net, x: attend(net.conv(x).flip(1).view(2, 2, 2, -1).mT)),
        """%contiguous_default: f32[2, 2@tp, 16, 2] = aten.contiguous(%transpose)  # pack-operands""",
    )


def test_an_input_is_packed_once_for_all_its_uses():
    assert_expected_inline(
        packed(lambda net, x: attend(x) + attend(x * 2), torch.contiguous_format),
        """%contiguous_default: f32[2, 2, 4, 4] = aten.contiguous(%x)  # pack-operands""",
    )


def test_left_alone_where_traced_values_are_contiguous():
    assert packed(lambda net, x: net.norm(net.conv(net.fc(x)).flip(1)), torch.contiguous_format) == ""


def test_left_alone_behind_a_product():
    assert packed(lambda net, x: attend(net.fc(net.conv(x).flip(1)).transpose(1, 2))) == ""


def test_left_alone_where_no_kernel_relies_on_it():
    assert packed(lambda net, x: net.conv(x).flip(1).relu()) == ""
