"""Passes as text in, text out: the .txt files here. EXPECTTEST_ACCEPT=1 rewrites what the passes make.

A file begins with the mesh and inputs. Cases follow, each under its title: the rest of a program, which may begin with
inputs of its own (or the mesh too), and behind `==>` what the pass makes of it; without that the pass leaves it alone.
Values stay.
"""

import os
from pathlib import Path

import pytest
import torch

from shardc.compiler.driver.saved.text_passes import Between, of_text, passes
from shardc.compiler.pipeline.stages import Stage
from tests.build import on_one_device, random_inputs, simulated

FOLDER = Path(__file__).parent
TAKES = {step.name: step.takes for step in passes()}


def cases(path: Path) -> list[tuple[str, str, str]]:
    """(title, program, what becomes of it or nothing) of each case."""
    head, *rest = path.read_text().split("\n# ")
    found = []
    for case in rest:
        title, _, body = case.partition("\n")
        before, _, after = body.strip().partition("\n==>\n")
        own = {line.partition(":")[0] for line in before.splitlines()}
        inputs = [line for line in head.strip().splitlines() if line.partition(":")[0] not in own]
        inputs = [] if before.startswith("mesh") else inputs
        found.append((title, "\n".join([*inputs, before]), after))
    return found


def values(program: Between) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inputs = random_inputs(program.traced.gm)
    if program.stage < Stage.LOCAL:
        return on_one_device(program.traced.gm, inputs)
    return simulated(program.traced.gm, program.ctx.mesh, inputs)


def without_inputs(text: str) -> str:
    return "\n".join(line for line in text.splitlines()[1:] if " = input" not in line and " = tangent" not in line)


ALL = [(path, *case) for path in sorted(FOLDER.rglob("*.txt")) for case in cases(path)]


@pytest.mark.parametrize(("path", "title", "given", "wanted"), ALL, ids=[f"{a.stem}: {b}" for a, b, *_ in ALL])
def test_a_pass(path: Path, title: str, given: str, wanted: str):
    name = path.stem.replace("_", "-")
    program, before = (of_text(given, title, TAKES[name].name) for _ in range(2))
    program.run(name)
    made = without_inputs(program.plain())
    if wanted and made != wanted and os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(path.read_text().replace(f"\n==>\n{wanted}\n", f"\n==>\n{made}\n"))
        wanted = made
    assert made == (wanted or without_inputs(before.plain()))
    if wanted:
        for have, want in zip(values(program), values(before), strict=True):
            assert torch.equal(have, want)
