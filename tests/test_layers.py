"""Who may import whom: the table of the layers, run over the imports as they are.

A module belongs to the first row whose pattern it matches or lies under, and may use only what that
row lists, and what lies under it. Imports inside functions and under TYPE_CHECKING count, and so
does reaching a watched name through an attribute (`torch.distributed.barrier()`).
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("compiler", "passes", "runtime", "tools")

# Our own names are written without "shardc."; "shardc" alone is the public facade.
FX = ["torch.fx"]
INTERNALS = "torch._*"  # a row with this may use any private module of torch
DISTRIBUTED = "torch.distributed"
DEVICE_MESH = ["torch.distributed.device_mesh.DeviceMesh", "torch.distributed.DeviceMesh"]
PLACEMENTS = [
    *(f"torch.distributed.tensor.{p}" for p in ("Placement", "Shard", "Replicate", "Partial")),
    "torch.distributed.tensor.placement_types",
    "torch.distributed.tensor.placement_types._StridedShard",
]

VALUES = ["compiler.mesh", "compiler.sizes", "compiler.spec", "compiler.errors"]
INFER = [*VALUES, "compiler.collectives", "compiler.infer", "compiler.graph", *FX]
WISHES = [f"compiler.{m}" for m in "layout plan resolved borders".split()]  # what passes see of a plan
FOURTH = [
    *(f"compiler.{m}" for m in "pipeline verify text cost marks signature local refine atoms".split()),
    *(f"compiler.{m}" for m in "averages halves accounts memory draws".split()),
    *WISHES,
]
PASS = [*INFER, *FOURTH]
CORE = [*PASS, "compiler.rules", "compiler.trace", "compiler.match", "compiler.trace_draws"]
API = [*CORE, "compiler", "passes.pipeline", "runtime", DISTRIBUTED]

VIEWER = [f"tools.{m}" for m in "pack timeline links".split()]  # what reads a dumped program, and nothing else

LAYERS = {  # first match wins
    "compiler.errors": [],
    "compiler.mesh": ["compiler.errors", *DEVICE_MESH],
    "compiler.sizes": [],
    "compiler.spec": [*VALUES, *PLACEMENTS],
    "compiler.rules": ["compiler.rules", "compiler.errors", *FX],
    "compiler.collectives": [*VALUES, *FX],
    "compiler.infer": [*INFER, "compiler.rules"],
    "compiler.graph": [*INFER, "compiler.rules"],
    "compiler.trace_store": [*CORE, "compiler"],
    "compiler.trace*": [*CORE, "compiler.trace_*", INTERNALS],
    "compiler.marks": [*CORE, *PLACEMENTS],
    **{
        f"compiler.{m}": ["compiler", *PLACEMENTS, *DEVICE_MESH, "torch.distributed.tensor.parallel"]
        for m in "layout plan annotate styles wording match splits roots forwards report resolve*".split()
    },
    # What compile is made of: one room in several files, the only one that sees both passes and runtime.
    **{f"compiler.{m}": [*CORE, "compiler"] for m in "saved family".split()},
    **{f"compiler.{m}": API for m in "api entries calls filling compiled lowering prove train_step check_rule".split()},
    # A program as data; it looks at a program, and nothing is done by it.
    "compiler.dump": [*CORE, *(f"compiler.{m}" for m in "explain flops text_changes program".split())],
    # A program shows itself: it hands its data, and no more, to the page maker, a leaf.
    "compiler.program": [*API, "tools.page"],
    "compiler": CORE,
    "passes.pipeline": [*PASS, "passes"],
    "passes": PASS,
    "runtime.deferred": ["runtime", *VALUES, "torch._C.DisableTorchFunctionSubclass"],
    "runtime.record": ["runtime", *VALUES, "torch.utils._python_dispatch.TorchDispatchMode"],
    "runtime": [
        *VALUES,
        "compiler.collectives",
        "compiler.graph",
        "compiler.text",
        "compiler.signature",
        "compiler.local",
        *FX,
        "runtime",
        DISTRIBUTED,
    ],
    **{f"tools.{m}": VIEWER for m in "page pack timeline links program_json model_explorer measured".split()},
    "tools": ["compiler", "tools", "shardc", DISTRIBUTED],
}
WATCHED = [*PARTS, "shardc", "tests", "examples", "benchmarks", "torch.fx", DISTRIBUTED]
# Spelled with an underscore, yet in the manual or without any other spelling.
OPEN = ["torch._check*", "torch._foreach_*", "torch._ops.OpOverload*", "torch.utils._pytree", "torch.ops"]


def under(name: str, pattern: str) -> bool:
    return name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def private(name: str) -> bool:
    """Whether a name of torch has a component with a leading underscore, `__version__` and OPEN apart."""
    if not under(name, "torch") or any(under(name, o) for o in OPEN):
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def granted(name: str, row: list[str]) -> bool:
    """A private name needs INTERNALS, or a grant that spells out the private component."""
    if private(name):
        if INTERNALS in row and not under(name, DISTRIBUTED):
            return True
        row = [g for g in row if private(g)]
    return any(under(name, g) for g in row)


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, and of every attribute reached through one."""
    bound: dict[str, str] = {}
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{base}.{alias.name}"
                yield node.lineno, f"{base}.{alias.name}"
    for node in ast.walk(tree):  # outer attributes come before the inner ones that they hold
        if not isinstance(node, ast.Attribute):
            continue
        inner.add(node.value)
        name = dotted(node, bound)
        if node not in inner and name:
            yield node.lineno, name


def dotted(node: ast.expr, bound: dict[str, str]) -> str | None:
    """The full name that `a.b.c` stands for, or None where `a` was not imported."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, bound)
        return f"{base}.{node.attr}" if base else None
    return None


def offences(module: str, source: str) -> list[str]:
    """What a module, named without `shardc.`, uses and its row does not grant."""
    row = next(row for pattern, row in LAYERS.items() if under(module, pattern))
    wrong = []
    for line, full in uses(ast.parse(source)):
        name = full.removeprefix("shardc.")
        ours = name.split(".")[0] in PARTS
        if full.startswith(".") or (ours and name == full):
            wrong.append(f"{module}:{line}: {full} is written shardc.* in full")
            continue
        name = name if ours else full
        if (private(name) or any(under(name, w) for w in WATCHED)) and not granted(name, row):
            wrong.append(f"{module}:{line}: must not use {name}")
    return wrong


def modules() -> Iterator[tuple[str, Path]]:
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def test_imports_follow_the_layers():
    wrong = [o for module, path in modules() for o in offences(module, path.read_text())]
    assert not wrong, "\n".join(["the table is LAYERS in tests/test_layers.py", *wrong])


def test_the_walk_reaches_every_part():
    assert {name.split(".")[0] for name, _ in modules()} == set(PARTS)


REFUSED = {
    "a pass imports the runtime": ("passes.fuse", "from shardc.runtime.wire.groups import bind"),
    "a pass imports another pass": ("passes.fuse", "from shardc.passes.local.localize import Localize"),
    "a pass imports the list of passes": ("passes.fuse", "from shardc.passes import pipeline"),
    "a pass imports rules": ("passes.fuse", "from shardc.compiler.rules.table import rule"),
    "a pass imports torch.distributed": ("passes.fuse", "import torch.distributed as dist"),
    "a pass reaches torch.distributed": ("passes.fuse", "import torch\ntorch.distributed.barrier()"),
    "a pass imports the facade": ("passes.fuse", "from shardc import Plan"),
    "a rule imports the mesh": ("compiler.rules.matmul", "from shardc.compiler.spec.mesh import Mesh"),
    "a rule imports specs, for types only": (
        "compiler.rules.matmul",
        "if TYPE_CHECKING:\n    from shardc.compiler.spec.spec import Spec",
    ),
    "the mesh uses fx": ("compiler.mesh", "from torch import fx"),
    "the mesh uses process groups": ("compiler.mesh", "from torch.distributed import new_group"),
    "a spec calls a collective": ("compiler.spec", "from torch.distributed import all_reduce"),
    "the graph imports a pass, in a function": (
        "compiler.graph",
        "def f():\n    import shardc.passes.local.localize",
    ),
    "the compiler imports its own api": ("compiler.verify", "from shardc.compiler.driver.compile import compile"),
    "the compiler imports the list of passes": ("compiler.verify", "import shardc.passes.pipeline"),
    "the api imports a single pass": ("compiler.api", "from shardc.passes.local.localize import Localize"),
    "the runtime imports the plan": ("runtime.bind", "from shardc.compiler.plan.plan import Plan"),
    "the runtime imports a rule": ("runtime.bind", "from shardc.compiler.rules import table"),
    "tools import a pass": ("tools.opt", "from shardc.passes.local.localize import Localize"),
    "anyone imports tools": ("compiler.api", "from shardc.tools import cli"),
    "a program imports more of tools": ("compiler.program", "from shardc.tools import cli"),
    "the compiler imports the page maker": ("compiler.dump", "from shardc.tools.page import page"),
    "the page maker looks at a program": ("tools.page", "from shardc.compiler.analysis.dump import dump"),
    "anyone imports tests": ("tools.opt", "from tests.models import mlp"),
    "private torch, imported": ("passes.fuse", "from torch._inductor import config"),
    "private torch, deeper": ("compiler.graph", "from torch.fx._symbolic_trace import Tracer"),
    "private torch, one name": ("compiler.graph", "from torch.fx.proxy import _find_arg"),
    "private torch, reached": ("compiler.api", "import torch\ntorch._dynamo.reset()"),
    "private torch.distributed in the runtime": ("runtime.bind", "import torch.distributed._tensor"),
    "private torch.distributed in trace": ("compiler.trace", "import torch.distributed._tensor"),
    "a bare name": ("compiler.graph", "from compiler.spec import Spec"),
    "a relative import": ("compiler.graph", "from .spec import Spec"),
}
GRANTED = {
    "a program shows itself": ("compiler.program", "from shardc.tools.page import page"),
    "a pass uses the graph": ("passes.fuse", "from shardc.compiler.ir.graph import replace"),
    "the list imports every pass": ("passes.pipeline", "from shardc.passes.local.localize import Localize"),
    "the api sees both sides": (
        "compiler.api",
        "from shardc.passes import pipeline\nimport shardc.runtime.run.bind",
    ),
    "trace uses internals": ("compiler.trace", "from torch._functorch import aot_autograd"),
    "a part of trace too": ("compiler.trace_jit", "import torch\ntorch._dynamo.reset()"),
    "a spec converts placements": (
        "compiler.spec",
        "from torch.distributed.tensor.placement_types import Shard, _StridedShard",
    ),
    "the mesh converts a DeviceMesh": (
        "compiler.mesh",
        "from torch.distributed.device_mesh import DeviceMesh",
    ),
    "operators may begin with an underscore": (
        "passes.fuse",
        "import torch\ntorch.ops.aten._softmax.default",
    ),
    "documented names may too": ("runtime.bind", "import torch\ntorch._foreach_norm([]), torch.__version__"),
    "names that only look like watched ones": ("passes.fuse", "import compilers, torch.distributions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    assert len(offences(*REFUSED[case])) == 1


@pytest.mark.parametrize("case", GRANTED)
def test_granted(case: str):
    assert offences(*GRANTED[case]) == []
