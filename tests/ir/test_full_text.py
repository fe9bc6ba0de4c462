"""A program's text in full is read back: the same text, values and passes; all else is refused with its line."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.fx import GraphModule

import shardc
from shardc import FullyShard, Mesh, Plan, PlanError, Replicated
from shardc.compiler.driver.saved.text_passes import Between, of_call
from shardc.compiler.ir.graph import copy_graph, placeholders
from shardc.compiler.ir.node import tensors
from shardc.compiler.ir.signature import Traced
from shardc.compiler.ir.text import input_names, text
from shardc.compiler.ir.text.full import full_text
from shardc.compiler.ir.text.literals import Scanner, literal
from shardc.compiler.ir.text.reader import read
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.spec.rank_numbers import Local
from shardc.compiler.spec.spec import Part
from tests.acceptance.models import MLP, MLP_TP, TRANSFORMER_TP, Transformer
from tests.build import on_one_device, simulated

TP = Part(10, ("tp",))


class Kept(nn.Module):
    """Data decides how many rows its results have, and one of them is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        kept = self.lin(x[x[:, 0] > 0])
        return {"kept": kept.tanh(), "rows": kept.shape[0], "how": ["as they come", None]}


class Normed(nn.Module):
    """Buffers change, a constant is met, a layout is fixed, and what is drawn is drawn again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6))
        self.scale = torch.arange(6.0)

    def forward(self, x: Tensor) -> Tensor:
        x = shardc.constrain(self.norm(self.lin(x)), shardc.Layout(dp=Shard(0)))
        return self.drop(x.mul(self.scale).t().contiguous().t())


PLAN = Plan(dp=FullyShard("layers.*"), tp=TRANSFORMER_TP)
PROGRAMS: dict[str, tuple[Any, Any, Mesh, tuple, dict]] = {
    "tensor parallel, uneven": (MLP, MLP_TP, Mesh(tp=4), (torch.randn(6, 16),), {}),
    "data parallel": (Normed, Plan(dp=Replicated()), Mesh(dp=2), (torch.randn(6, 4),), {"recompute": "drop"}),
    "fully sharded and tensor parallel": (Transformer, PLAN, Mesh(dp=2, tp=2), (torch.ones(4, 6).long(),), {}),
    "sizes that data decides": (Kept, Plan(dp=Replicated()), Mesh(dp=2), (torch.randn(6, 4),), {}),
    "on few ranks": (MLP, Plan(dp=FullyShard("net*", reshard_after_forward=2)), Mesh(dp=4), (torch.randn(8, 16),), {}),
    "narrow on the wire": (
        MLP, Plan(dp=Replicated(reduce_dtype=torch.bfloat16), tp=MLP_TP), Mesh(dp=2, tp=2), (torch.randn(8, 16),), {},
    ),
}  # fmt: skip


@cache
def stages(case: str) -> dict[Stage, Between]:
    """The program at the end of each stage."""
    model, plan, mesh, inputs, options = PROGRAMS[case]
    program = of_call(shardc.compile(model(), plan, mesh=mesh, **options), *inputs)
    found = {}
    for stage in Stage:
        if stage > Stage.TRACED:
            program.run(until=stage.name)
        traced = Traced(copy_graph(program.traced.gm), program.traced.signature)
        found[stage] = replace(program, traced=traced)
    return found


def printed(traced: Traced, mesh: Mesh) -> str:
    return text(traced.gm, mesh, input_names(traced.signature))


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("case", PROGRAMS)
def test_what_is_written_is_read_back_and_passes_go_on_from_it(case: str, stage: Stage):
    program, last = stages(case)[stage], stages(case)[Stage.SCHEDULED]
    written = program.text()
    back = read(written)
    assert full_text(back.traced, back.mesh, **back.head) == written
    was, now = program.ctx.signature, back.traced.signature
    assert (now.leaves, now.out_spec, now.in_spec, now.tied) == (was.leaves, was.out_spec, was.in_spec, was.tied)
    assert [replace(i, value=None) for i in was.inputs] == list(now.inputs)
    again = Between(back.traced, replace(program.ctx, signature=now), stage, back.head.get("ran", 0), planned=True)
    if stage < Stage.SCHEDULED:
        again.run(until="SCHEDULED")
    assert printed(again.traced, back.mesh) == printed(last.traced, back.mesh)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("case", [case for case in PROGRAMS if case != "sizes that data decides"])
def test_what_is_read_computes_the_same(case: str, stage: Stage):
    program = stages(case)[stage]
    back = read(program.text()).traced.gm
    for have, want in zip(outcome(back, case, stage), outcome(program.traced.gm, case, stage), strict=True):
        assert torch.equal(have, want)


def outcome(gm: GraphModule, case: str, stage: Stage) -> list[Any]:
    """What a program computes: on one device, or simulated on all ranks."""
    torch.manual_seed(1)
    inputs = [torch.randint(0, 4, x.shape).to(x.dtype) for n in placeholders(gm) for x in tensors(n)]
    return simulated(gm, PROGRAMS[case][2], inputs) if stage >= Stage.LOCAL else on_one_device(gm, inputs)


def test_what_is_printed_is_read_too_as_far_as_it_goes():
    for stage, program in stages("tensor parallel, uneven").items():
        shown = printed(program.traced, program.ctx.mesh)
        back = read(shown, stage=stage.name)
        assert printed(back.traced, back.mesh) == shown


# ---- single values


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN | st.sampled_from([torch.bfloat16, torch.float8_e5m2, torch.strided, torch.device("cpu"), ..., slice(1, 2)])
    | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_any_value_is_read_as_it_was_written(value: Any):
    scanner = Scanner(literal(value), "")
    assert scanner.value() == value and not scanner.take(".")


@pytest.mark.parametrize("number", [
    Local((TP,)), Local((Part(3, ("tp",)), Part(4))), Local((TP,)) * 2 + 1, -Local((TP,), "start"),
    (Local((TP,), "start") - 1) % 3, Local((TP,), "place") * -4, 7 - Local((TP,), "stop"),
])  # fmt: skip
def test_numbers_of_ranks(number: Local):
    assert Scanner(f"[{literal(number)}, 3]", "", Mesh(tp=4)).value() == [number, 3]


@pytest.mark.parametrize("written", ["[]", "[8@dp, 4]+tp", "[(3@dp 4), 2]", "[8@tp.dp]", "[8@dp/2]", "[8]+max(dp)+tp"])
def test_layouts(written: str):
    assert str(Scanner(written, "", Mesh(dp=4, tp=2)).layout()) == written


# ---- what is no program


GOOD = """\
mesh dp=2 tp=2
%x: f32[8@dp, 4] = input x
%w: f32[4, 6@tp] = param w
%mm: f32[8@dp, 6@tp] = aten.mm(%x, %w)
%sort: (f32[8@dp, 6@tp], i64[8@dp, 6@tp]) = aten.sort(%mm)
%get: f32[8@dp, 6@tp] = getitem(%sort, 0)
return (%get)"""
BAD = {  # line: (what it is in place of, what is said)
    "mess": (1, "expected the mesh"),
    "mesh dp=0": (1, "mesh dim dp has size 0"),
    "mesh dp=2 tp=999999999": (1, "too many ranks"),
    "mesh dp=2 tp=2  !{stage=3}": (1, "no attribute stage of this kind"),
    "%x: f32[8@pp, 4] = input x": (2, "no mesh dim pp"),
    "%x: f32[8@dp/3, 4] = input x": (2, "no mesh dim dp/3"),
    "%x: f99[8, 4] = input x": (2, "no dtype f99"),
    "%x: f32[99999999999, 99999999999] = input x": (2, "no such value"),
    "%x: f32[9999999999999999999999] = input x": (2, "expected a size"),
    "%x: f32[8@dp, 4] = input x  !{of=3}": (2, "no attribute of of this kind"),
    "%x: f32[8@dp, 4] = input x  !{stride=[(1, 2, 3)]}": (2, "no such value"),
    '%x: f32[8@dp, 4] = input x  !{device=device("moon")}': (2, "no such value"),
    "%class: f32[8@dp, 4] = input x": (2, "cannot be a value's name"),
    "%x: f32[8@dp, 4] = thing x": (2, "thing is no kind of input"),
    "%x: f32[4, 6@tp] = param w": (3, "%x is there already"),
    "%mm: f32[8@dp, 6@tp] = aten.mm(%x, %v)": (4, "no value %v is made above"),
    "%mm: f32[8@dp, 6@tp] = aten.mm(%x)": (4, "mat2 is to be a value"),
    "%mm: f32[8@dp, 6@tp] = aten.mm(%x, w)": (4, "mat2 is to be a value"),
    "%mm: f32[8@dp, 6@tp] = aten.mm(%x, %w, of=3)": (4, "does not take so many arguments"),
    "%mm: f32[8@dp, 6@tp] = os.system(%x)": (4, "os.system is no operator here"),
    "%mm: f32[8@dp, 6@tp] = aten.__class__(%x)": (4, "is no operator here"),
    "%mm: f32[8@dp, 6@tp] = torch.load(%x)": (4, "is no operator here"),
    "%mm: f32[8@dp, 6@tp] = shardc.all_gather(%x, 0, pp)": (4, "no mesh dim pp"),
    "%mm: f32[8@dp, 6@tp] = shardc.all_gather(%x)": (4, "missing a required argument"),
    "%mm: f32[8@dp, 6@tp] = aten.mm(%x, %w, " + "[" * 5000: (4, "more than 40 lists"),
    "%mm: f32[8@dp, 6@tp] = aten.mm(%x, %w))": (4, "expected the end of the line"),
    "%get: f32[8@dp, 6@tp] = getitem(%sort, 2)": (6, "there is no such result"),
    "%get: f32[8@dp, 6@tp] = getitem(%mm, 0)": (6, "there is no such result"),
    "%get: f32[8@dp, 6@tp] = input get": (6, "inputs come first"),
    "return %get": (7, "in parentheses"),
    "return (3)": (7, "a program returns values"),
    "return (%get)  !{in_spec=tree(builtins.function, None)}": (7, "no such value"),
    "return (%get)\noutput a\noutput b": (7, "it describes no result"),
    "return (%get)\ngradient %mm": (7, "no such value"),
    "return (%get)\n%y: f32[] = input y": (7, "what is returned"),
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_no_program_is_refused_with_its_line(line: str):
    number, said = BAD[line]
    lines = [*map(str, GOOD.splitlines())]
    lines[number - 1] = line
    with pytest.raises(PlanError) as error:
        read("\n".join(lines), "p.txt", "SHARDED")
    where = number + line.count("\n") if number == 7 else number
    assert said in str(error.value) and (f"p.txt:{where}" in str(error.value) or not error.value.where)


PIECES = [
    *"%()[]{}\"'=\\\n\0", "%x", ", ", ": ", "@dp", "+tp", "  !{", "  # ", "None", "-1", "1e99", "9" * 30, "inf", "u0",
    "layout", "tree(", "aten.mm", "getitem(", "slice(", "\u00e9", "f32",
]  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(["data parallel", "on few ranks"]), st.sampled_from(Stage), st.randoms(use_true_random=False))
def test_a_mutated_text_is_read_or_refused_and_nothing_else(case: str, stage: Stage, random: Random):
    lines = stages(case)[stage].text().split("\n")
    for _ in range(random.randint(1, 3)):
        i, j = random.randrange(len(lines)), random.randrange(len(lines))
        at = random.randrange(len(lines[i]) + 1)
        match random.randrange(4):
            case 0:
                lines[i] = lines[i][:at] + random.choice(PIECES) + lines[i][at + random.randint(0, 4) :]
            case 1:
                lines[i], lines[j] = lines[j], lines[i]
            case 2:
                lines[i] = lines[i][:at] + lines[j][random.randrange(len(lines[j]) + 1) :]
            case 3 if len(lines) > 1:
                del lines[i]
    try:
        back = read("\n".join(lines))
    except PlanError as error:
        assert not error.where or error.where.startswith("line:")
    else:
        full_text(back.traced, back.mesh, **back.head)


def test_the_names_in_a_text_run_nothing(tmp_path: Path):
    flag = tmp_path / "ran"
    code = f'__import__("pathlib").Path("{flag}").touch()'
    good = stages("data parallel")[Stage.TRACED].text()
    names = ["%x: ", "input x", "aten.mm", "%mm", "requires_grad", "path=", "lin", "at="]
    assert all(name in good for name in ("input x", "path=lin", "at="))
    for name in names:
        for put in (f"{name}={code}", f"{name} {code}", code, f'{name}"{code}"'):
            try:
                back = read(good.replace(name, put))
            except PlanError:
                continue
            back.traced.gm.recompile()
            assert back.traced.gm.code
    assert not flag.exists()
