"""The README's quick start runs as written, and its commands exist; pages that show ranks say what they print."""

import re
import subprocess
import sys
from pathlib import Path

from tests.runtime.ranks import on_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def quick_start() -> str:
    return re.search(r"```python\n(.*?)```", README, re.S).group(1)


def test_the_quick_start_runs_as_written_and_proves_itself(capsys):
    names: dict = {}
    exec(compile(quick_start(), "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "mesh dp=2 tp=2" in shown
    assert {c.kind for c in names["program"].collectives()} == {"all_reduce"}
    assert float(shown.splitlines()[-1]) < 1e-5


def test_the_quick_start_is_at_most_fifteen_lines():
    assert len([line for line in quick_start().splitlines() if line.strip()]) <= 15


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^    make ([a-z]+)", README, re.M)) <= targets


def test_every_folder_and_page_named_exists():
    for name in re.findall(r"\| `([a-z]+/)` \|", README):
        assert (ROOT / name).is_dir(), name


@on_ranks
def test_the_page_on_inputs_prints_what_it_says(tmp_path: Path):
    page = (ROOT / "docs/inputs_and_results.md").read_text()
    script, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", page, re.S).groups()
    (tmp_path / "scores.py").write_text(script)
    done = subprocess.run([sys.executable, "scores.py"], cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
