"""`shardc opt`, as typed: passes on a program's text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from shardc.tools.cli import main
from tests.tools.programs import program

FROM = ("--from", f"{Path(__file__).parent}/programs.py:target", "--mesh", "dp=2,tp=2")


@pytest.fixture
def opt(capsys, monkeypatch):
    """What the command prints, given a text on standard input."""

    def run(*arguments: str, given: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        code, said = main(["opt", *arguments]), capsys.readouterr()
        return said.err if code else said.out.removesuffix("\n")

    return run


def test_a_program_is_written_and_taken_to_what_compile_makes_of_it(opt, tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text(opt(*FROM, "--until", "SHARDED"))
    assert opt(str(path), "--plain") == program().stage("SHARDED")
    local = opt(str(path), "--until", "localize")
    assert "stage=LOCAL" in local and "aten.view(" not in local
    assert opt("--until", "LOCAL", "--plain", given=local) == program().stage("LOCAL")
    assert opt("--until", "SCHEDULED", "--plain", given=local) == str(program())


PRINTED = """\
mesh tp=2
%x: f32[8, 4] = input x
%w: f32[4, 6@tp] = param w
%b: f32[6@tp] = param b
%mm: f32[8, 6@tp] = aten.mm(%x, %w)
%add: f32[8, 6@tp] = aten.add.Tensor(%mm, %b)
return (%add)"""


def test_one_pass_on_a_program_as_it_is_printed(opt):
    last = ["%add: f32[8, 6@tp] = aten.addmm(%b, %x, %w)  # fuse-bias", "return (%add)"]
    assert opt("--pass", "fuse-bias", given=PRINTED).splitlines() == PRINTED.splitlines()[:4] + last


def test_passes_are_listed_with_their_stages(opt):
    lines = [line.split() for line in opt("--list").splitlines()]
    assert lines[0] == ["canonicalize", "TRACED", "->", "TRACED"]
    assert ["propagate", "TRACED", "->", "SHARDED"] in lines


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (["--pass", "seed-plan"], PRINTED, "seed-plan cannot run on a text: it asks the plan how parameters"),
        (["--until", "SHARDED"], PRINTED, "seed-plan cannot run on a text"),
        (["--pass", "fuse"], PRINTED, "no pass of the pipeline is, or leads to, fuse"),
        (["--pass", "fuse-bias"], PRINTED.replace("tp=2", "tp=2  !{stage=RESHARDED}"), "takes a program that is LOCAL"),
        (["--pass", "fuse-bias"], PRINTED.replace("tp=2", "tp=2  !{stage=ROUND}"), "no such stage"),
        (["--pass", "fuse-bias"], PRINTED.replace("%b)", "%c)"), "standard input:6"),
        (["nowhere.txt"], "", "nowhere.txt"),
        (["--from", "nothing", "--mesh", "tp=2"], "", "file.py:function"),
        ([*FROM[:2]], "", "--mesh is missing"),
    ],
)
def test_mistakes_are_said(arguments: list[str], given: str, said: str, opt):
    assert said in opt(*arguments, given=given)
