"""Sequence parallelism: what tensor parallelism would sum is scattered over the sequence, and gathered again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)

import shardc
from shardc import Layout, Mesh, Plan, Replicated
from tests.acceptance.compare import (
    at_most,
    backward,
    compare,
    counts,
    forward,
    held_numel,
    moved_numel,
    output_shape,
    wire_bytes,
)
from tests.acceptance.models import LLAMA_SP, TRANSFORMER_SP, Block, Llama, Transformer

pytestmark = pytest.mark.slow


class Feed(nn.Module):
    """Norm, MLP, residual: half of a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


FEED_SP = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}
BLOCK_SP = {
    "norm[12]": SequenceParallel(),
    **{name: ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v", "up")},
    "attn.proj": RowwiseParallel(output_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}
SLICES = {"inputs": Shard(1), "outputs": Shard(1)}


@pytest.mark.parametrize("w, time", [(2, 8), (4, 8), (4, 6), (2, 5), (4, 3)])
def test_half_a_block_gathers_and_scatters_once_each_way(w: int, time: int):
    """Cases 6 and 24: and the gradients that norms and biases own are summed once, sizes uneven or not."""
    program = compare(Feed(), FEED_SP, Mesh(tp=w), torch.randn(2, time, 16), **SLICES)
    found = counts(program)
    assert found.pop(("all_reduce", "tp", "backward"), 0) <= 3  # of the norm's weight and bias, of down's bias
    assert found == {
        ("all_gather", "tp", "forward"): 1,
        ("reduce_scatter", "tp", "forward"): 1,
        ("all_gather", "tp", "backward"): 1,
        ("reduce_scatter", "tp", "backward"): 1,
    }
    assert output_shape(program) == (2, -(-time // w), 16)
    moved = [c for c in program.collectives() if c.kind != "all_reduce"]
    assert sum(c.bytes_on_wire for c in moved) == 4 * (w - 1) * 2 * -(-time // w) * 16 * 4


def test_a_block_moves_no_more_bytes_than_with_all_reduces():
    """Case 24: an all-reduce is a reduce-scatter and an all-gather."""
    x = torch.randn(2, 8, 16)
    sequence = compare(Block(), BLOCK_SP, Mesh(tp=2), x, **SLICES)
    whole = {
        **{name: ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v", "up")},
        **{name: RowwiseParallel() for name in ("attn.proj", "down")},
    }
    tensor = compare(Block(), whole, Mesh(tp=2), x)
    assert counts(tensor) == forward("all_reduce", 2) | backward("all_reduce", 2)
    found = counts(sequence)
    small = found.pop(("all_reduce", "tp", "backward"))
    assert small <= 6
    assert set(found.values()) == {2} and len(found) == 4
    sums = [c for c in sequence.collectives() if c.kind == "all_reduce"]
    assert {c.numel for c in sums} == {16}
    assert wire_bytes(sequence) - sum(c.bytes_on_wire for c in sums) == wire_bytes(tensor)


@pytest.mark.parametrize("w, tied", [(4, True), (2, False)], ids=["4, tied", "2, untied"])
def test_a_transformer_reduces_no_activation(w: int, tied: bool):
    """Case 24."""
    model = Transformer(tied=tied).double()
    program = compare(model, TRANSFORMER_SP, Mesh(tp=w), torch.randint(16, (3, 8)))
    found = counts(program)
    reduced = [c for c in program.collectives() if c.kind == "all_reduce"]
    assert all(c.phase == "backward" and c.numel == 16 for c in reduced)  # parameters' gradients, a row each
    found.pop(("all_reduce", "tp", "backward"))
    limits = forward("reduce_scatter", 6) | forward("all_gather", 6)
    limits |= backward("reduce_scatter", 5) | backward("all_gather", 6)
    limits[("all_reduce", "tp", "backward")] = len(reduced)
    assert at_most(program, limits), found


@pytest.mark.parametrize("heads", [4, 3])
def test_uneven_sequences_and_heads_are_right(heads: int):
    """Cases 24 and 213."""
    model = Transformer(vocab=13, dim=12, heads=heads, layers=1, length=7).double()
    compare(model, TRANSFORMER_SP, Mesh(tp=2), torch.randint(13, (2, 7)))


def test_a_llama_is_right():
    """Case 24, with norms that are plain modules."""
    program = compare(Llama().double(), LLAMA_SP, Mesh(tp=2), torch.randint(13, (2, 6)))
    assert not any(c.kind == "all_reduce" and c.phase == "forward" for c in program.collectives())


def test_with_data_parallelism_only_gradients_cross_the_replicas():
    """Case 24 on (2, 2)."""
    plan = Plan(dp=Replicated(), tp=FEED_SP)
    both = Layout(dp=Shard(0), tp=Shard(1))
    program = compare(Feed(), plan, Mesh(dp=2, tp=2), torch.randn(4, 6, 16), inputs=both, outputs=both)
    over_dp = [c for c in program.collectives() if c.mesh_dim == "dp"]
    assert {(c.kind, c.phase) for c in over_dp} == {("all_reduce", "backward")}
    assert moved_numel(program, "dp") == held_numel(program)


@pytest.mark.parametrize("w", [2, 4])
def test_a_norm_alone_takes_a_whole_input_apart(w: int):
    """Cases 19 and 204: the root input is whole, as no layout of it is given."""
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    program = compare(model, {"0": SequenceParallel()}, Mesh(tp=w), torch.randn(2, 6, 16))
    assert output_shape(program) == (2, 6, 16)


def test_sequence_dim_may_be_another():
    """Case 19: time first."""
    model = nn.Sequential(nn.LayerNorm(16))
    plan = {"0": SequenceParallel(sequence_dim=0)}
    program = compare(model, plan, Mesh(tp=2), torch.randn(6, 2, 16), inputs=Shard(0), outputs=Shard(0))
    assert counts(program) == backward("all_reduce", 2)


def test_inputs_of_a_block_are_gathered_where_its_style_says_so():
    """Case 12: one gather of a block's input serves all its projections."""
    block = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan = {**BLOCK_SP, "attn": block}
    program = compare(Block(), plan, Mesh(tp=2), torch.randn(2, 8, 16), **SLICES)
    assert counts(program)[("all_gather", "tp", "forward")] == 2


def test_a_relayout_at_both_ends_of_a_module_wraps_what_is_inside():
    """Case 12, one level down."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.feed = nn.Linear(16, 16), Feed()

        def forward(self, x: Tensor) -> Tensor:
            return self.feed(self.stem(x))

    both = PrepareModuleInputOutput(
        input_layouts=(Replicate(),),
        desired_input_layouts=(Shard(1),),
        output_layouts=(Shard(1),),
        desired_output_layouts=(Replicate(),),
    )
    plan = {"feed": both, **{f"feed.{name}": style for name, style in FEED_SP.items()}}
    program = compare(Around(), plan, Mesh(tp=2), torch.randn(2, 6, 16))
    assert output_shape(program) == (2, 6, 16)
    assert counts(program)[("all_gather", "tp", "forward")] == 2


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.n, self.u, self.d = nn.Embedding(64, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return x + self.d(torch.relu(self.u(self.n(x))))


def test_freezing_parameters_never_makes_backward_move_more():
    plan = {
        "e": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "n": SequenceParallel(),
        "u": ColwiseParallel(input_layouts=Shard(1)),
        "d": RowwiseParallel(output_layouts=Shard(1)),
    }

    def moved(*frozen: str) -> int:
        model = Frozen()
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        program = shardc.compile(model, plan, mesh=Mesh(tp=4), outputs=Shard(1)).lower(torch.randint(64, (8, 16)))
        return sum(c.bytes_on_wire for c in program.collectives() if c.phase == "backward")

    alone = {names: moved(*names) for names in ((), ("n",), ("d",), ("u", "d"), ("n", "u", "d"))}
    assert all(n <= alone[()] for n in alone.values()), alone
    assert alone[("n",)] == alone[()] - 2 * 384  # two sums of 64 numbers over 4 ranks, its own gradients
