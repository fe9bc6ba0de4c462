"""What a caller gets of a program whose ranks are simulated, changes in place, and hands on to autograd."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, PlanError, Replicated
from shardc.compiler.ir.graph import inputs_of
from shardc.compiler.ir.node import spec
from shardc.compiler.ir.signature import InputKind
from tests.acceptance.door.kinds import KINDS, Attends, Repeated, Twins, door
from tests.agree import agrees

DP = Mesh(dp=2)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_a_program_are_the_callers_own(kind: type[Twins]):
    door(kind, Plan(dp=FullyShard()), DP)
    door(kind, {"a.weight": Shard(0)}, Mesh(tp=3))


def test_one_tensor_in_two_layouts_is_refused():
    layouts = (Layout(dp=Shard(0)), [Replicate(), None], None)
    compiled = shardc.compile(Repeated(), Plan(dp=Replicated()), mesh=DP, outputs=layouts)
    with pytest.raises(PlanError, match=r"output\[1\]\[0\] and output\[0\] are one tensor, and asked for in two"):
        compiled(torch.randn(4, 4).double())


def test_inputs_that_are_no_rows_of_the_batch_are_whole_on_every_rank():
    for rows in (4, 6):  # of as many rows as there are columns too
        program = agrees(Attends(), Attends.inputs(rows), DP, Plan(dp=Replicated()))
        layouts = [str(spec(node)) for _, node in inputs_of(program.gm, program.signature, InputKind.BATCH)]
        assert layouts == [f"[{rows}@dp, 6]", "[6, 6]", "[1, 6]", "[5]", f"[{rows}@dp, 6]"]
