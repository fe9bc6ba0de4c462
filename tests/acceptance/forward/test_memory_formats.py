"""However values lie in memory, programs are right: channels_last, transposed, sliced, expanded; after gathers too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import PrepareModuleInput

import shardc
from shardc import FullyShard, Mesh, Plan, Replicated
from tests.acceptance.compare import EXACT, same_gradients
from tests.runtime.ranks import on_ranks, run_ranks


def attend(net: Images, h: Tensor) -> Tensor:
    q = h.view(h.shape[0], 2, 4, -1).transpose(-1, -2)
    return F.scaled_dot_product_attention(q, q * 2, q + 1)


def norm(net: Images, h: Tensor) -> Tensor:
    return net.norm(h)


def pool(net: Images, h: Tensor) -> Tensor:
    return F.adaptive_max_pool3d(h.unsqueeze(2), (1, 3, 3))


def labels(net: Images, h: Tensor) -> Tensor:
    """A loss for each pixel."""
    return F.nll_loss(h.log_softmax(1), h.argmax(1).detach(), reduction="none")


class Images(nn.Module):
    """A convolution in channels_last, then what moves rows or channels between ranks, then a kernel."""

    def __init__(self, over: int, kernel: Callable[[Images, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.over, self.kernel, self.conv, self.norm = over, kernel, nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.double().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self, self.conv(x).flip(self.over))


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "as usual": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


SPLIT = {"conv.weight": Shard(0)}


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def check(compiled: nn.Module, alone: nn.Module, mine: tuple[Tensor, ...], whole: tuple[Tensor, ...], rank: int = 0):
    ours, theirs = compiled(*mine), alone(*whole)
    ranks = len(theirs) // len(ours)
    torch.testing.assert_close(ours, theirs.chunk(ranks)[rank], **EXACT)
    weight = torch.linspace(-1, 1, theirs.numel(), dtype=theirs.dtype).view(theirs.shape).sin()
    (ours * weight.chunk(ranks)[rank]).sum().mul(ranks).backward()
    (theirs * weight).sum().backward()


@pytest.mark.parametrize("kernel", [attend, norm, pool, labels])
@pytest.mark.parametrize(
    ("plan", "over", "ranks"),
    [(Replicated(), 0, 2), ({"conv.weight": Shard(0)}, 1, 2), ({"conv.weight": Shard(0)}, 1, 3)],
)
def test_a_kernel_reads_what_is_there(plan: Any, over: int, ranks: int, kernel: Callable[..., Tensor]):
    alone = Images(over, kernel)
    compiled = shardc.compile(copy.deepcopy(alone), plan, mesh=Mesh(d=ranks))
    for lie in LIES.values():
        x = lie(images())
        check(compiled, alone, (x,), (x,))
        same_gradients(compiled, alone, EXACT)
    assert len(compiled.programs) == 1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.double))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * self.scale, k, v)


def heads(lie: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    made = [torch.randn(4, 2, 6, 8, generator=draw, dtype=torch.double) for _ in range(3)]
    if lie == "expanded":
        made[1:] = [x[:1].expand(4, -1, -1, -1) for x in made[1:]]
    return [LIES.get(lie, LIES["as usual"])(x) for x in made]


@pytest.mark.parametrize("inputs", [Shard(0), Shard(1), Shard(2)])
def test_inputs_may_lie_otherwise_than_those_it_was_traced_with(inputs: Shard):
    alone = Attention()
    compiled = shardc.compile(copy.deepcopy(alone), {"": PrepareModuleInput()}, mesh=Mesh(d=2), inputs=inputs)
    for lie in (*LIES, "expanded"):
        check(compiled, alone, tuple(heads(lie)), tuple(heads(lie)))
        same_gradients(compiled, alone, EXACT)


def on_each_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("d",))
    for plan in (Plan(d=Replicated()), Plan(d=FullyShard())):
        for kernel in (attend, norm):
            alone = Images(0, kernel)
            compiled = shardc.compile(copy.deepcopy(alone), plan, mesh=mesh)
            for lie in LIES.values():
                check(compiled, alone, (lie(images().chunk(2)[rank]),), (images(),), rank)
            for mine, its in zip(compiled.parameters(), alone.parameters(), strict=True):
                grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
                torch.testing.assert_close(grad, its.grad, **EXACT)


@on_ranks
def test_the_same_on_ranks():
    run_ranks(on_each_rank, 2)


def test_nothing_is_packed_where_all_is_as_it_was_traced():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    program = shardc.compile(block, Replicated(), mesh=Mesh(d=2)).lower(torch.randn(4, 6, 8))
    assert "scaled_dot_product" in str(program) and "# pack-operands" not in str(program)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2).double()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.fc(x[ids])


def test_a_program_is_proved_also_where_its_views_are_copies():
    """What an index that lies otherwise gives lies otherwise too, which tracing does not know."""
    alone, x = Rows(), torch.randn(12, 6, dtype=torch.double)
    compiled, ids = shardc.compile(copy.deepcopy(alone), Replicated(), mesh=Mesh(d=3)), torch.randint(12, (9, 3)).t()
    torch.testing.assert_close(compiled(x, ids), alone(x, ids), **EXACT)
    compiled.programs[-1].verify(x, ids)
