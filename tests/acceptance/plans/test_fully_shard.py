"""ACCEPTANCE section 3 on simulated ranks: units are gathered, freed and reduced as counted by hand."""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, Program, Replicated
from shardc.compiler.ir.views import last_uses
from tests.acceptance.compare import ADAM, SGD, compare, counts, held_numel
from tests.acceptance.models import MLP, Block, Deep, Transformer
from tests.acceptance.plans.test_sequence_parallel import BLOCK_SP

GATHER, AGAIN, SCATTER = (
    ("all_gather", "dp", "forward"),
    ("all_gather", "dp", "backward"),
    ("reduce_scatter", "dp", "backward"),
)


class Framed(nn.Module):
    """Blocks between two Linears that the root takes."""

    def __init__(self, blocks: int = 3, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 5)
        self.layers = nn.ModuleList(MLP(width, 7) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def rows(width: int = 6, n: int = 4) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64)


def sharded(model: nn.Module, *args: Any, ranks: int = 2, steps: int = 1, options: Any = None, **fully: Any) -> Program:
    """Compared with one device over some steps of Adam."""
    plan = Plan(dp=FullyShard(*fully.pop("patterns", ("layers.*",)), **fully))
    return compare(model.double(), plan, Mesh(dp=ranks), *args, optimizer=ADAM, steps=steps, **options or {})


# --- 44 to 48: what is held, gathered and reduced


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_the_chunks_of_torch(ranks: int):
    model = nn.Sequential(*(nn.Linear(9, 3) if i % 2 else nn.Linear(3, 9) for i in range(4)))
    compiled = shardc.compile(model, Plan(dp=FullyShard()), mesh=Mesh(dp=ranks))
    program = compiled.lower(torch.randn(ranks, 3))
    for name, p in model.named_parameters():
        spec, mesh = program.plan.params[name].stored, program.mesh
        chunks = [spec.local_shape(mesh, mesh.coords(r)) for r in range(ranks)]
        pieces = [tuple(piece.shape) for piece in p.chunk(ranks)]
        assert chunks == pieces + [(0, *p.shape[1:])] * (ranks - len(pieces)), name


@pytest.mark.parametrize("shapes", [((16, 15), (15, 8)), ((7, 15), (15, 3)), ((16, 17), (17, 8))])
def test_one_unit_of_uneven_shapes_trains(shapes: Any):
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in shapes))
    program = sharded(model, rows(shapes[0][0]), ranks=2, steps=3, patterns=())
    assert counts(program) == {GATHER: 1, AGAIN: 1, SCATTER: 1}


def largest(p: Tensor) -> Shard:
    return Shard(max(range(p.dim()), key=lambda d: p.shape[d]))


def test_shards_lie_on_the_largest_dim():
    program = sharded(Framed(), rows(), ranks=4, placement=largest)
    assert str(program.plan.params["layers.0.net2.weight"].stored) == "[6, 7@dp]"
    assert counts(program) == {GATHER: 4, AGAIN: 4, SCATTER: 4}


@pytest.mark.parametrize(("reshard", "again"), [(True, 4), (False, 0)])
def test_one_gather_per_unit_and_way_and_one_reduction(reshard: bool, again: int):
    x = rows()
    program = sharded(Framed(), x, reshard_after_forward=reshard)
    assert counts(program) == {GATHER: 4, SCATTER: 4} | ({AGAIN: again} if again else {})
    for kind in ("all_gather", "reduce_scatter"):
        found = {c.fqn: c for c in program.collectives() if (c.kind, c.phase) in (GATHER[::2], SCATTER[::2])}
        assert set(found) == {"", "layers.0", "layers.1", "layers.2"}, kind
    block = next(c for c in program.collectives() if c.kind == "reduce_scatter" and c.fqn == "layers.1")
    elements = 6 * 7 + 7 + 7 * 6 + 6
    largest_row = 4 * 6 + 4 + 3 * 7 + 3  # of 7 rows the first of 2 ranks holds 4
    assert (block.numel, block.bytes_on_wire) == (elements, largest_row * 8)


def units_alive(program: Program) -> int:
    """Of how many units gathered parameters are there at once, at most, in either half."""
    most = 0
    for half in (program.halves.forward, program.halves.backward):
        assert half is not None
        nodes = list(half.graph.nodes)
        last, alive = last_uses(nodes), [set() for _ in nodes]
        for i, node in enumerate(nodes):
            if "all_gather" in node.name and "getitem" not in node.name:
                parts = [p for u in (node, *node.users) for p in (u, *u.users) if p.target is operator.getitem]
                ends = [last.get(n, i) for n in (node, *parts)]
                for units in alive[i : max(ends)]:
                    units.add(node.meta["unit"])
        most = max(most, *map(len, alive))
    return most


def test_no_more_than_two_units_are_there_at_once():
    x = rows()
    assert (
        units_alive(shardc.compile(Framed(6), Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2)).lower(x.float())) == 2
    )
    peaks = [sharded_peak(blocks) for blocks in (3, 6)]
    three_more = sum(p.numel() * 4 for p in Deep(3, 16).parameters())
    assert peaks[1] - peaks[0] < three_more  # their shards, gradients' shards and activations, never all of them whole


def sharded_peak(blocks: int) -> int:
    plan = Plan(dp=FullyShard("layers.*"))
    return shardc.compile(Deep(blocks, 16), plan, mesh=Mesh(dp=4)).lower(torch.randn(4, 16)).peak_bytes()


def test_the_next_unit_is_gathered_ahead_of_time():
    plan = Plan(dp=FullyShard("stem", "head", "layers.*"))
    program = shardc.compile(Framed(), plan, mesh=Mesh(dp=2)).lower(rows().float())
    names = [n.name for n in program.gm.graph.nodes]
    assert sum(n.startswith("start_all_gather") for n in names) >= 4
    assert units_alive(program) == 2


# --- 49 to 56: uses of every kind


class Twice(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
        if tied:
            self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return first(third(first(x).relu()))  # the second is never called


def test_a_unit_called_twice_is_gathered_once_and_one_that_is_not_called_never():
    program = sharded(Twice(), rows(), steps=2)
    assert counts(program) == {GATHER: 2, AGAIN: 2, SCATTER: 2}


def test_weights_tied_across_units_belong_to_what_holds_both():
    program = sharded(Twice(tied=True), rows(), steps=3)
    assert program.plan.params["layers.0.weight"].aliases == ("layers.2.weight",)
    moved = [c.numel for c in program.collectives() if c.kind == "reduce_scatter"]
    assert sorted(moved) == [6, 6, 36]  # two biases, and the one weight


def test_where_only_biases_train_only_biases_are_reduced():
    model = Framed()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    program = sharded(model, rows())
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert sum(c.numel for c in program.collectives() if c.kind == "reduce_scatter") == biases


class Result(NamedTuple):
    y: Tensor
    extras: dict[str, Any]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Taking(), Taking()])

    def forward(self, batch: dict[str, Tensor]) -> Result:
        first = self.layers[0]([batch["x"], batch["z"]])
        second = self.layers[1](first)
        return Result(second["y"], {"list": [second["z"]], "tuple": (first["y"], None)})


class Taking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, given: Any) -> dict[str, Tensor]:
        y, z = given if isinstance(given, list) else given.values()
        return {"y": self.lin(y) + z, "z": z * 2}


def test_units_take_and_return_structures():
    sharded(Structured(), {"x": rows(), "z": rows()})


def test_a_loss_of_one_output_leaves_the_rest_without_gradients_of_their_own():
    model = Structured().double()
    alone, batch = copy.deepcopy(model), {"x": rows(), "z": rows()}
    compiled = shardc.compile(model, Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2))
    for one in (compiled, alone):
        one(batch).extras["tuple"][0].square().sum().backward()
    torch.testing.assert_close(model.layers[0].lin.weight.grad, alone.layers[0].lin.weight.grad)  # pyright: ignore


def test_a_child_by_itself_after_a_step_of_the_root():
    """54: nothing that was gathered for the root's step is still in use. Real ranks: test_fully_shard.py."""
    model, x = Framed().double(), rows()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2))
    for one in (compiled, alone):
        optimizer = ADAM(one.parameters())
        one(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        one.get_submodule("layers.1")(x).square().sum().backward()
    for (name, p), q in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not name.startswith("layers.1.")), name
        torch.testing.assert_close(p.grad, q.grad)


def test_outputs_of_which_one_is_used_and_a_unit_that_is_not():
    """55: what a loss does not reach has no gradient, or zeros where the unit ran; nothing is left waiting."""
    model, x = Twice().double(), rows()
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2))
    for one in (compiled, alone):
        one(x).square().sum().backward()
    for (name, p), q in zip(compiled.named_parameters(), alone.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None) == name.startswith("layers.1."), name


# --- 58, 59: with other mesh dims

BOTH = Layout(replica=Shard(0), dp=Shard(0))


def test_hybrid_sharding_reduces_within_and_then_across():
    plan = Plan(replica=Replicated(), dp=FullyShard("layers.*"))
    program = compare(Framed().double(), plan, Mesh(replica=2, dp=2), rows(), optimizer=ADAM, steps=2)
    assert counts(program) == {GATHER: 4, AGAIN: 4, SCATTER: 4, ("all_reduce", "replica", "backward"): 1}
    (across,) = [c for c in program.collectives() if c.mesh_dim == "replica"]
    assert across.numel == held_numel(program)  # of the shards alone


@pytest.mark.parametrize("hidden", [3, 16, 17])
@pytest.mark.parametrize("order", [("dp", "tp"), ("tp", "dp")])
def test_with_tensor_parallelism_in_either_order(hidden: int, order: tuple[str, str]):
    entries = {"dp": FullyShard("net*"), "tp": {"net1": ColwiseParallel(), "net2": RowwiseParallel()}}
    plan, mesh = Plan(**{a: entries[a] for a in order}), Mesh(**dict.fromkeys(order, 2))
    program = compare(MLP(8, hidden).double(), plan, mesh, rows(8), optimizer=ADAM)
    found = counts(program)
    assert (found[GATHER], found[SCATTER]) == (2, 2)
    assert found[("all_reduce", "tp", "forward")] == 1


@pytest.mark.slow
def test_with_sequence_parallelism_and_another_dim_than_its_own():

    plan = Plan(dp=FullyShard(placement=lambda p: Shard(p.dim() - 1)), tp=BLOCK_SP)
    layout = Layout(dp=Shard(0), tp=Shard(1))
    x = torch.randn(4, 6, 16, dtype=torch.float64)
    for recompute in (None, ""):
        compare(Block().double(), plan, Mesh(dp=2, tp=2), x, inputs=layout, outputs=layout, recompute=recompute)


# --- 63 to 67


def test_in_double_precision_after_compile():
    model = Framed()
    alone, x = copy.deepcopy(model).double(), rows()
    compiled = shardc.compile(model, Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2)).to(torch.float64)
    compiled(x).square().sum().backward()
    alone(x).square().sum().backward()
    for p, q in zip(compiled.parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype is torch.float64
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_ignored_parameters_are_neither_split_nor_reduced():
    plan = Plan(dp=FullyShard("layers.*", ignored_params="*.bias"))
    program = shardc.compile(Framed(), plan, mesh=Mesh(dp=2)).lower(rows().float())
    spared = {name for name, layout in program.plan.params.items() if "dp" in layout.local}
    assert spared == {"stem.bias", "head.bias"}
    assert all(program.plan.params[name].stored.is_whole for name in spared)


class Odd(nn.Module):
    """A scalar, a convolution in channels_last, and a parameter that repeats one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.conv = nn.Conv2d(3, 6, 3, padding=1).to(memory_format=torch.channels_last)  # pyright: ignore
        self.shift = nn.Parameter(torch.tensor(0.5).expand(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale + self.shift


def test_scalars_and_odd_strides():
    model = Odd().double()
    alone, x = copy.deepcopy(model), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    compiled = shardc.compile(model, Plan(dp=FullyShard()), mesh=Mesh(dp=2))
    for one in (compiled, alone):
        one(x).square().sum().backward()
    for name, p in compiled.named_parameters():
        torch.testing.assert_close(p.grad, alone.get_parameter(name).grad)
    found = counts(compiled.programs[-1])
    assert found == {GATHER: 1, AGAIN: 1, SCATTER: 1, ("all_reduce", "dp", "backward"): 1}


@pytest.mark.parametrize("recompute", [None, "layers.*"])
def test_two_forwards_before_one_backward(recompute: Any):
    model = Framed().double()
    alone, chosen, rejected = copy.deepcopy(model), rows(), rows()
    compiled = shardc.compile(model, Plan(dp=FullyShard("layers.*")), mesh=Mesh(dp=2), recompute=recompute)
    for one in (compiled, alone):
        F.logsigmoid(one(chosen).sum() - one(rejected).sum()).backward()
    for name, p in compiled.named_parameters():
        torch.testing.assert_close(p.grad, alone.get_parameter(name).grad)
    found = counts(compiled.programs[-1])
    assert found == {GATHER: 4, AGAIN: 3, SCATTER: 4}  # the head is held, and nothing needs the stem


@pytest.mark.slow
def test_a_transformer_with_tied_weights():
    model = Transformer(vocab=9, layers=2, tied=True)
    before, plan = model.tokens.weight.detach().double().clone(), Plan(dp=FullyShard("layers.*"))
    ids = torch.arange(24).view(4, 6) % 9
    program = compare(model.double(), plan, Mesh(dp=4), ids, optimizer=SGD, steps=10, grads=False)
    assert counts(program) == {GATHER: 3, AGAIN: 2, SCATTER: 3}  # backward begins with the root's head
    assert (model.tokens.weight != before).any(1).all()  # the last rank's short shard too


# --- reshard_after_forward as a number of ranks


PAIRS = ("all_gather", "dp/2", "backward")


@pytest.mark.parametrize(("ranks", "to"), [(4, 2), (6, 3)])
def test_parameters_kept_over_some_ranks_are_gathered_from_those(ranks: int, to: int):
    """Rows that neither all ranks nor some of them divide: 7, 6 and 5."""
    program = sharded(Framed(), rows(n=ranks), ranks=ranks, steps=5, reshard_after_forward=to)
    assert counts(program) == {GATHER: 4, ("all_gather", f"dp/{to}", "backward"): 4, SCATTER: 4}
    block = next(c for c in program.collectives() if c.mesh_dim == f"dp/{to}" and c.fqn == "layers.1")
    largest = -(-7 // to) * 6 + -(-6 // to) * 7
    assert (block.numel, block.bytes_on_wire) == (7 * 6 + 6 * 7, (to - 1) * largest * 8)


def test_what_one_rank_and_what_all_ranks_keep_is_whole_and_what_is_stored():
    x, found = rows(), []
    for after in (1, False, 4, True):
        program = shardc.compile(Framed(), FullyShard("layers.*", reshard_after_forward=after), mesh=Mesh(dp=4))
        found.append(str(program.lower(x.float())))
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]


def test_what_some_ranks_keep_lies_between_all_and_none():
    def held(after: bool | int) -> int:
        plan = Plan(dp=FullyShard("layers.*", reshard_after_forward=after))
        return shardc.compile(Deep(6, 16), plan, mesh=Mesh(dp=4)).lower(torch.randn(4, 16)).peak_bytes()

    assert held(True) < held(2) < held(False)


def test_units_may_keep_differently():
    model = Framed().double()
    for module, after in zip((*model.layers, model), (2, False, True, 2), strict=True):
        shardc.fully_shard(module, reshard_after_forward=after)
    program = compare(model, None, Mesh(dp=4), rows(), optimizer=ADAM)
    again = [(c.fqn, c.mesh_dim) for c in program.collectives() if c.kind == "all_gather" and c.phase == "backward"]
    assert sorted(again) == [("", "dp/2"), ("layers.0", "dp/2"), ("layers.2", "dp")]


def test_some_ranks_of_a_hybrid_mesh_keep_parameters():
    plan = Plan(replica=Replicated(), dp=FullyShard("layers.*", reshard_after_forward=2))
    program = compare(Framed().double(), plan, Mesh(replica=2, dp=4), rows(n=8), optimizer=ADAM, steps=5)
    assert counts(program) == {GATHER: 4, PAIRS: 4, SCATTER: 4, ("all_reduce", "replica", "backward"): 1}


@pytest.mark.parametrize("sizes", [{"dp": 4, "tp": 2}, {"tp": 2, "dp": 4}])
def test_some_ranks_keep_what_tensor_parallelism_splits(sizes: dict[str, int]):
    entries = {
        "dp": FullyShard("net*", reshard_after_forward=2),
        "tp": {"net1": ColwiseParallel(), "net2": RowwiseParallel()},
    }
    plan = Plan(**{axis: entries[axis] for axis in sizes})
    program = compare(MLP(8, 17).double(), plan, Mesh(**sizes), rows(8), optimizer=ADAM, steps=5)
    assert counts(program)[PAIRS] == 2
    program.verify(rows(8))


def test_in_a_region_that_is_computed_again_all_ranks_gather_again():
    fully = {"reshard_after_forward": 2, "options": {"recompute": "layers.*"}}
    program = sharded(Framed(), rows(), ranks=4, **fully)
    assert counts(program) == {GATHER: 4, AGAIN: 3, PAIRS: 1, SCATTER: 4}
    assert [note for note in program.notes() if "over all ranks" in note] == [
        f"layers.{i}: computed again in backward, so gathered again over all ranks" for i in range(3)
    ]
