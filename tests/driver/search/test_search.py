"""Plans found by search: which, that they are right, and that what is said of them is what the program does."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

import shardc
from shardc import FullyShard, Hardware, Mesh, Plan, PlanError, Replicated
from tests.driver.search.models import Decoder, ids, mlp

NAMES = {
    kind.__name__: kind
    for kind in (
        *(ColwiseParallel, RowwiseParallel, SequenceParallel, PrepareModuleInput, PrepareModuleOutput),
        *(PrepareModuleInputOutput, Plan, FullyShard, Replicated, Shard, Replicate),
    )
}


def wires(**links: float) -> Hardware:
    """A machine of which only the wires cost."""
    return Hardware("wires", 1e15, 1e15, links, latency=0.0, launch=0.0)


def adam_bytes(program: shardc.Program) -> int:
    """The peak of a program with Adam's two moments, counted by what the ranks hold."""
    return program.peak_bytes() + sum(2 * row["bytes_per_rank"] for row in program.plan.report())


def checked(model: nn.Module, mesh: Mesh, *inputs: torch.Tensor, **told):
    """A search whose plan compiles, equals one device, reads as Python, and takes the memory that it says."""
    found = shardc.search(model, mesh, inputs, **told)
    assert repr(eval(repr(found.plan), dict(NAMES))) == repr(found.plan)
    options = {"recompute": found.recompute} if found.recompute else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = shardc.compile(model, found.plan, mesh=mesh, **options).lower(*inputs)
    assert program.verify(*inputs) < 1e-4
    assert found.peak_bytes == adam_bytes(program)
    assert 0 < found.bound <= found.seconds <= 1.01 * min([found.seconds, *(c.seconds for c in found.alternatives)])
    if "hardware" not in told and not found.recompute:
        assert found.seconds == pytest.approx(program.optimality().cost, rel=1e-6)
    return found


def test_many_rows_are_split_and_parameters_stay_whole():
    assert checked(mlp(), Mesh(dp=4), torch.randn(512, 16)).plan == Plan(dp=Replicated())


def test_parameters_are_split_where_they_do_not_fit():
    model, mesh, x = mlp(64, 256), Mesh(dp=4), torch.randn(256, 64)
    whole = shardc.search(model, mesh, x)
    assert whole.plan == Plan(dp=Replicated())
    found = shardc.search(model, mesh, x, memory=0.9 * whole.peak_bytes)
    assert isinstance(found.plan.entries["dp"], FullyShard)
    assert found.peak_bytes <= 0.9 * whole.peak_bytes


def test_few_rows_and_wide_layers_are_split_in_columns_and_rows():
    found = checked(mlp(), Mesh(tp=4), torch.randn(2, 16))
    assert repr(found.plan) == 'Plan(tp={"0": ColwiseParallel(), "2": RowwiseParallel()})'


def test_heads_hidden_and_vocabulary_are_split_together_and_patterns_cover_layers():
    """Beside data parallelism, which is kept as it is given."""
    found = checked(Decoder(layers=2), Mesh(dp=2, tp=2), ids(2), fixed=Plan(dp=Replicated()))
    columns = [f"layers.*.{name}" for name in ("q", "k", "v", "up")]
    rows = [f"layers.*.{name}" for name in ("o", "down")]
    assert list(found.plan.entries) == ["dp", "tp"] and found.plan.entries["dp"] == Replicated()
    styles = {key: type(style) for key, style in dict(found.plan.entries["tp"]).items()}
    expected = dict.fromkeys([*columns, "head"], ColwiseParallel) | dict.fromkeys(rows, RowwiseParallel)
    assert expected.items() <= styles.items()


def test_parameters_are_split_over_the_fast_wire_and_copied_over_the_slow():
    """Then the slow one carries the gradients of a part."""
    mesh, machine = Mesh(outer=2, inner=2), wires(outer=1e8, inner=1e9)
    found = checked(Decoder(width=64, layers=2), mesh, ids(64), hardware=machine)
    assert found.plan.entries["outer"] == Replicated() and isinstance(found.plan.entries["inner"], FullyShard)


def test_a_sequence_is_split_between_what_is_split_where_its_rows_do_not_fit():
    model, mesh, x = Decoder(width=32, layers=2), Mesh(tp=4), ids(1, 65)
    fastest = shardc.search(model, mesh, x)
    assert not any(isinstance(style, SequenceParallel) for style in dict(fastest.plan.entries["tp"]).values())
    found = checked(model, mesh, x, memory=0.8 * fastest.peak_bytes)
    assert any(isinstance(style, SequenceParallel) for style in dict(found.plan.entries["tp"]).values())


def test_what_repeats_is_computed_again_where_nothing_else_fits():
    model, mesh, x = Decoder(layers=5), Mesh(dp=2), ids(8, 17)
    fixed = Plan(dp=FullyShard("layers.*"))
    whole = shardc.search(model, mesh, x, fixed=fixed)
    found = checked(model, mesh, x, fixed=fixed, memory=0.8 * whole.peak_bytes)
    assert found.plan == fixed and found.recompute == ("layers.*",) and whole.recompute == ()
    assert found.seconds > whole.seconds


def test_what_is_fixed_stays_and_is_added_to():
    fixed = Plan(tp={"0": ColwiseParallel(), "0.bias": Shard(0)})
    found = checked(mlp(), Mesh(tp=4), torch.randn(2, 16), fixed=fixed)
    assert list(found.plan.entries["tp"])[:2] == ["0", "0.bias"]
    all_said = Plan(tp={"0": RowwiseParallel(), "2": ColwiseParallel()})
    assert repr(shardc.search(mlp(), Mesh(tp=4), torch.randn(2, 16), fixed=all_said).plan) == repr(all_said)


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("traced")


ON_EACH = "parameters, gradients and the optimizer's state alone take 16.6 kB on each of 4 ranks"
MISTAKES = {
    "unknown preset": (
        {"hardware": "tpu"},
        "there is no hardware 'tpu'\n   = help: presets: neutral, a100, h100, h200; or a Hardware",
    ),
    "negative": ({"memory": -1}, 'memory is -1\n   = help: memory is bytes of a rank above 0, or text such as "80GB"'),
    "no bytes": (
        {"memory": "80 apples"},
        "memory is '80 apples'\n   = help: memory is bytes of a rank above 0, or text such as \"80GB\"",
    ),
    "too little": (
        {"memory": "1kB"},
        f"memory is 1 kB a rank, and {ON_EACH}\n   = help: more ranks, or more memory",
    ),
    "no such module": ({"fixed": Plan(tp={"down": ColwiseParallel()})}, 'tp["down"] matches nothing'),
    "no such mesh dim": (
        {"fixed": Plan(dp=Replicated())},
        'the plan names the mesh dim dp, but the mesh has tp\n   = help: the nearest name is "tp"',
    ),
    "against itself": (
        {"fixed": Plan(tp={"u*": ColwiseParallel(), "*p": RowwiseParallel()})},
        'two keys match up\n   | tp["u*"] = ColwiseParallel()\n   | tp["*p"] = RowwiseParallel()\n'
        '   = help: a key that writes the name out wins over patterns: add "up"',
    ),
    "precision": ({"precision": "half"}, "precision is 'half'\n   = help: precision is a shardc.Precision"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_any_work(name: str):
    told, text = MISTAKES[name]
    with pytest.raises(PlanError) as error:
        shardc.search(Untraced(), Mesh(tp=4), torch.zeros(2, 64), **told)
    what, line, *rest = str(error.value).splitlines()
    assert line.startswith("  --> test_search.py:")
    assert "\n".join([what, *rest]) == f"plan error: {text}"


def test_a_limit_that_cannot_be_met_is_refused_with_the_least():
    model, mesh, x = mlp(), Mesh(dp=2), torch.randn(512, 16)
    with pytest.raises(PlanError, match="the least that a plan was found for") as error:
        shardc.search(model, mesh, x, memory=70_000)
    least = int(str(error.value).split("(")[1].split(" bytes")[0].replace(",", ""))
    assert 70_000 < least == shardc.search(model, mesh, x, memory=least).peak_bytes


def test_a_module_that_asks_which_arguments_are_one_keeps_its_form():
    """torch's attention multiplies once where query, key and value are one."""
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    found = checked(model, Mesh(tp=2), torch.randn(1, 6, 16))
    styled = [key for key, style in dict(found.plan.entries["tp"]).items() if not isinstance(style, Shard)]
    assert "self_attn" not in styled and "linear1" in styled


def test_auto_compiles_what_is_found_for_the_first_call():
    x = torch.randn(2, 16)
    found = shardc.search(mlp(), Mesh(tp=4), x)
    compiled = shardc.compile(mlp(), "auto", mesh=Mesh(tp=4))
    compiled(x).sum().backward()
    (program,) = compiled.programs
    assert program.verify(x) < 1e-5
    assert str(program) == str(shardc.compile(mlp(), found.plan, mesh=Mesh(tp=4)).lower(x))


def test_the_model_is_left_as_it_is():
    model = mlp()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    shardc.search(model, Mesh(tp=2), torch.randn(2, 16))
    assert type(model) is nn.Sequential
    assert all(id(p) == before[name][0] and p.equal(before[name][1]) for name, p in model.named_parameters())
