"""docs/passes.md is made of what the passes say of themselves, in the order in which they run.

EXPECTTEST_ACCEPT=1 .venv/bin/pytest tests/passes/test_page.py    writes it anew
"""

import inspect
import os
import re
import sys
from pathlib import Path

from shardc.compiler.pipeline.runner import Context
from shardc.compiler.spec.mesh import Mesh
from shardc.passes import pipeline

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/passes.md"
HEAD = """# The passes, in the order in which they run

Made from the passes' own docstrings by tests/passes/test_page.py; the list is passes/pipeline.py. A pass runs with
`shardc opt --pass NAME` on a program's text, and `compile(..., without=("NAME",))` leaves out one that is optional.
"""


def reasons() -> dict[str, str]:
    """Class name -> what the list of passes says of it; lines that go on begin with dots there."""
    source = inspect.getsource(pipeline)
    named = dict(re.findall(r"^ *(\w+) = (\w+)\(", source, re.MULTILINE))  # variables that stand for a pass
    found = re.findall(r"^ +(\w+)\b.*,  # (.*)$", source, re.MULTILINE)
    return {named.get(name, name): re.sub(r" {2,}.*", "", why).removeprefix("... ") for name, why in found}


def page() -> str:
    ctx = Context(Mesh(x=1), None, None)  # pyright: ignore[reportArgumentType]
    parts, said = [HEAD], reasons()
    for step in dict.fromkeys(pipeline.pipeline(ctx)):
        module = sys.modules[type(step).__module__]
        file = Path(module.__file__ or "").resolve().relative_to(ROOT).as_posix()
        optional = ", optional" if step.name in pipeline.OPTIONAL else ""
        stages = " to ".join(dict.fromkeys((step.takes.name, step.gives.name)))
        head, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n")
        reason = f" Why: {said[type(step).__name__]}." if type(step).__name__ in said else ""
        parts.append(f"## {step.name}\n\n`{file}`, {stages}{optional}.{reason}\n\n{head}\n\n{_quoted(rest)}".rstrip())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _quoted(text: str) -> str:
    """Indented stretches of a docstring as code."""
    out, code = [], False
    for line in text.strip("\n").split("\n"):
        inside = line.startswith("    ") or (code and line.strip() in ("", "==>"))
        if inside != code and (inside or line.strip()):
            last = [out.pop()] if code and not out[-1] else []
            out += ["```", *last]
            code = inside
        out.append(line[4:] if line.startswith("    ") else line)
    return "\n".join(out + ["```"] * code)


def test_the_page_is_what_the_passes_say():
    if os.environ.get("EXPECTTEST_ACCEPT"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_every_pass_has_a_reason_in_the_list():
    ctx = Context(Mesh(x=1), None, None)  # pyright: ignore[reportArgumentType]
    assert {type(step).__name__ for step in pipeline.pipeline(ctx)} - set(reasons()) == set()
