"""The house in figures, measured over the source as it is: `make house`. Exit 1 where one is over its limit.

Rooms are listed in reading order: a room knows only rooms above it. Imports inside functions and under
TYPE_CHECKING count. Two doors are open the other way: `Program.verify` and `Program.view`.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
PARTS = ("compiler", "passes", "runtime", "tools")
COUNTED = (*PARTS, "shardc")

# What a finished program has left behind.
RULES = "compiler.rules.table compiler.rules.notation compiler.rules.site compiler.rules.steps"
FINISHED = f"{RULES} compiler.rules.checks compiler.rules.ops compiler.plan compiler.infer compiler.trace"
FINISHED += " compiler.pipeline passes"
# Reading order, lowest first, and what a room is blind to although it lies below. A module belongs to the longest
# name that it is or lies under.
ROOMS = {
    "compiler.errors": "",
    "compiler.user_code": "",
    "compiler.spec": "",
    "compiler.rules": "compiler.spec",
    "compiler.rules.ops": "compiler.spec",
    "compiler.ir": "compiler.rules.ops",
    "compiler.plan": "compiler.rules compiler.ir.node compiler.ir.graph",
    "compiler.infer": "compiler.rules.ops",
    "compiler.trace": "compiler.plan compiler.infer",
    "compiler.pipeline": "compiler.rules",
    "passes": f"{RULES} compiler.trace",
    **dict.fromkeys(["runtime", "runtime.wire", "runtime.run"], FINISHED),
    **dict.fromkeys(["runtime.checkpoint", "runtime.values"], f"{FINISHED} compiler.ir"),
    "runtime.replicas": "compiler passes",
    "runtime.launch": "compiler.spec compiler.ir compiler.plan compiler.rules compiler.trace passes",
    "compiler.analysis": "passes runtime",
    "compiler.proof": "",
    "compiler.driver": "passes.layouts passes.reshards passes.local",
    **dict.fromkeys(
        ["tools.links", "tools.timeline"],
        f"{FINISHED} compiler.ir compiler.analysis compiler.proof compiler.driver runtime",
    ),
    **{f"tools.{m}": "compiler passes runtime" for m in "pack page program_json measured".split()},
    "tools": "passes runtime",
}
ALONE = ("passes",)  # rooms whose files do not know each other, but for the list of them
# Who may use what of torch's that is watched: rooms, and single names for others.
WATCHED = {
    "torch.fx": "compiler.rules compiler.ir compiler.infer compiler.trace compiler.pipeline passes runtime.run "
    "compiler.analysis compiler.proof compiler.driver",
    "torch.distributed": "runtime compiler.driver tools",
}
BORDER = ("torch.distributed.device_mesh.DeviceMesh", "torch.distributed.tensor")  # torch's vocabulary of layouts
BORDERS = ("compiler.spec", "compiler.plan", "compiler.ir.marks")
DOORS = {  # (file, what it may reach although that lies further down)
    ("compiler.analysis.program", "compiler.proof.prove"),  # Program.verify
    ("compiler.analysis.program", "tools.page"),  # Program.view
}
META = ("compiler.ir", "compiler.trace")  # who may subscript node.meta
ANNEX = "compiler.trace.torch_internals"  # the one file that names what is private in torch
# Spelled with an underscore, yet in the manual or without any other spelling.
OPEN = ("torch._check", "torch._foreach_", "torch._ops.OpOverload", "torch.utils._pytree", "torch.ops.")
OPEN += ("torch._subclasses.fake_tensor.FakeTensorMode", "torch.utils._python_dispatch.TorchDispatchMode")
# torch has no other name for the placement of a split inside a dim.
STRIDED = ("torch.distributed.tensor.placement_types._StridedShard",)
MOST_FILES, MOST_LINES, LONGEST_FUNCTION = 15, 400, 60


def sources(*parts: str) -> dict[str, Path]:
    """Module name without `shardc.` -> file."""
    out = {}
    for part in parts:
        for path in sorted((ROOT / part).rglob("*.py")):
            out[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return out


def under(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".")


def room_of(module: str) -> str:
    rooms = [r for r in ROOMS if under(module, r)]
    return max(rooms, key=len, default=module.split(".")[0])


def uses(source: str) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, and of every attribute reached through one."""
    tree = ast.parse(source)
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
        if isinstance(node, ast.Attribute):
            inner.add(node.value)
            if node not in inner and (name := dotted(node, bound)):
                yield node.lineno, name


def dotted(node: ast.expr, bound: dict[str, str]) -> str:
    """The full name that `a.b.c` stands for; empty where `a` was not imported."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, "")
    base = dotted(node.value, bound) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base and isinstance(node, ast.Attribute) else ""


def offences(module: str, source: str) -> list[tuple[str, int, str]]:
    """(kind, line, name) of what a module, named without `shardc.`, uses though its room may not."""
    wrong = []
    for line, full in uses(source):
        name = full.removeprefix("shardc.")
        if full.startswith(".") or full.split(".")[0] in (*PARTS, "tests", "benchmarks"):
            wrong.append(("not written shardc.* in full", line, full))
        elif full.startswith("shardc") and (full == name or name.split(".")[0] not in PARTS):
            if not under(module, "tools"):
                wrong.append(("up", line, full))
        elif full.startswith("shardc"):
            wrong += [("up", line, name)] if is_up(module, name) else []
        elif not outside_allowed(module, full):
            wrong.append(("watched", line, full))
        elif is_private(full) and module != ANNEX and full not in STRIDED:
            wrong.append(("private torch", line, full))
    return wrong


def is_up(module: str, name: str) -> bool:
    """Whether a room knows, by this name, one that comes later or that it is blind to."""
    if any(module == a and under(name, b) for a, b in DOORS):
        return False
    order, low, high = list(ROOMS), room_of(module), room_of(name)
    blind = any(under(name, other) for other in ROOMS[low].split())
    beside = low == high and low in ALONE and module != f"{low}.pipeline"
    return blind or beside or order.index(low) < order.index(high)


def outside_allowed(module: str, name: str) -> bool:
    if any(under(name, b) for b in BORDER) and any(under(module, r) for r in BORDERS):
        return True
    return all(
        any(under(module, room) for room in rooms.split()) for what, rooms in WATCHED.items() if under(name, what)
    )


def arrows() -> nx.DiGraph:
    """Which module imports which."""
    known = sources(*PARTS)
    graph = nx.DiGraph()
    for module, path in known.items():
        for _, full in uses(path.read_text()):
            parts = full.removeprefix("shardc.").split(".")
            found = (".".join(parts[:k]) for k in range(len(parts), 1, -1))
            to = next((name for name in found if name in known), None) if full.startswith("shardc.") else None
            if to is not None and to != module:
                graph.add_edge(module, to)
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def meta_uses(path: Path) -> list[int]:
    """Lines that touch a node's meta."""
    tree = ast.parse(path.read_text())
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "meta"]


def is_private(name: str) -> bool:
    """Whether a name of torch has a component with a leading underscore, `__version__` and OPEN apart."""
    if not under(name, "torch") or any(name.startswith(o) or name == o.removesuffix(".") for o in OPEN):
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def folders(*parts: str) -> dict[str, int]:
    """Python files in each folder."""
    found = [p.parent.relative_to(ROOT).as_posix() for p in sources(*parts).values()]
    return {folder: found.count(folder) for folder in sorted(set(found))}


def over() -> list[str]:
    """Everything that is over a limit, a line each."""
    graph, files = arrows(), sources(*COUNTED)
    lines = {path: len(path.read_text().splitlines()) for path in files.values()}
    wrong = [f"{f}/: {n} files" for f, n in folders(*COUNTED, "tests", "benchmarks").items() if n > MOST_FILES]
    wrong += [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lines.items() if n > MOST_LINES]
    wrong += [f"{p}: {f} has {n} lines" for p in lines for f, n in functions(p) if n > LONGEST_FUNCTION]
    wrong += [f"circle: {', '.join(c)}" for c in circles(graph)]
    for module, path in files.items():
        if not any(under(module, room) for room in META):
            wrong += [f"meta: {path.relative_to(ROOT)}:{line}" for line in meta_uses(path)]
        if not under(module, "shardc"):
            wrong += [f"{kind}: {module}:{line} {what}" for kind, line, what in offences(module, path.read_text())]
    return wrong


def report() -> str:
    graph, files = arrows(), sources(*COUNTED)
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    lengths = [n for path in files.values() for _, n in functions(path)]
    rows = []
    for room in (*ROOMS, "shardc"):
        inside = [n for name, n in lines.items() if room_of(name) == room]
        if inside:
            rows.append(f"{room:22} {len(inside):4} files {sum(inside):6} lines, longest {max(inside)}")
    rings = circles(graph)
    ups = [o for m, path in sources(*PARTS).items() for o in offences(m, path.read_text()) if o[0] == "up"]
    return "\n".join(
        [
            *rows,
            f"{len(lines)} files, {sum(lines.values())} lines; median file {statistics.median(lines.values()):.0f}, "
            f"longest {max(lines.values())}; median function {statistics.median(lengths):.0f}, longest {max(lengths)}",
            f"{graph.number_of_edges()} arrows, {len(ups)} up beside {len(DOORS)} doors, {len(rings)} circles",
        ]
    )


if __name__ == "__main__":
    print(report())
    faults = over()
    print(*faults[: None if "--all" in sys.argv else 40], sep="\n")
    kinds = [f.split(":")[0] for f in faults]
    print("; ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(k for k in kinds if "/" not in k)) or "nothing over")
    sys.exit(bool(faults))
