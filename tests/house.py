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

# Reading order, lowest first. A module belongs to the longest name that it is or lies under.
ROOMS = (
    "compiler.errors",
    "compiler.user_code",
    "compiler.spec",
    "compiler.rules",
    "compiler.rules.ops",
    "compiler.ir",
    "compiler.plan",
    "compiler.infer",
    "compiler.trace",
    "compiler.pipeline",
    "passes",
    "runtime.workers",
    "runtime.shards",
    "runtime.wire",
    "runtime.run",
    "runtime.checkpoint",
    "runtime.values",
    "runtime.replicas",
    "runtime.launch",
    "compiler.analysis",
    "compiler.proof",
    "compiler.driver",
    "tools",
)
BLIND = (("passes", "runtime"), ("compiler.analysis", "runtime"), ("compiler.analysis", "passes"))
DOORS = {  # (file, what it may reach although that lies further down)
    ("compiler.analysis.program", "compiler.proof.prove"),  # Program.verify
    ("compiler.analysis.program", "tools.page"),  # Program.view
}
META = ("compiler/ir/", "compiler/trace/")  # who may subscript node.meta
ANNEX = "compiler/trace/torch_internals.py"  # the one file that names what is private in torch
# Spelled with an underscore, yet in the manual or without any other spelling.
OPEN = ("torch._check", "torch._foreach_", "torch._ops.OpOverload", "torch.utils._pytree", "torch.ops.")
MOST_FILES, MOST_LINES, LONGEST_FUNCTION = 15, 400, 60


def sources(*parts: str) -> dict[str, Path]:
    """Module name without `shardc.` -> file."""
    out = {}
    for part in parts:
        for path in sorted((ROOT / part).rglob("*.py")):
            out[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return out


def room_of(module: str) -> str:
    rooms = [r for r in ROOMS if module == r or module.startswith(r + ".")]
    return max(rooms, key=len, default=module.split(".")[0])


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardc."):
            base = (node.module or "").removeprefix("shardc.")
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("shardc.") for a in node.names if a.name.startswith("shardc.")}
    return {name for name in found if name in known}


def arrows() -> nx.DiGraph:
    known = sources(*PARTS)
    edges = ((m, to) for m, path in known.items() for to in imports(path, known) if to != m)
    return nx.DiGraph(edge for edge in edges)


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def upward(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """Imports of a room that comes later, or that is blind to this one; the doors are left out."""
    wrong = []
    for a, b in graph.edges:
        low, high = room_of(a), room_of(b)
        blind = any(a.startswith(x) and b.startswith(y) or a.startswith(y) and b.startswith(x) for x, y in BLIND)
        if (blind or ROOMS.index(low) < ROOMS.index(high)) and (a, b) not in DOORS:
            wrong.append((a, b))
    return sorted(wrong)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def meta_uses(path: Path) -> list[int]:
    """Lines that touch a node's meta."""
    tree = ast.parse(path.read_text())
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "meta"]


def private_torch(path: Path) -> list[tuple[int, str]]:
    """(line, name) of each private name of torch that a file imports or reaches."""
    tree = ast.parse(path.read_text())
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute) and (name := dotted(node)).startswith("torch."):
            found.append((node.lineno, name))
    return sorted({(line, name) for line, name in found if is_private(name)})


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def is_private(name: str) -> bool:
    if any(name.startswith(o) or name == o.removesuffix(".") for o in OPEN):
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
    wrong += [f"up: {a} -> {b}" for a, b in upward(graph)]
    for path in lines:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(META):
            wrong += [f"meta: {name}:{line}" for line in meta_uses(path)]
        if name != ANNEX:
            wrong += [f"private torch: {name}:{line} {what}" for line, what in private_torch(path)]
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
    ups, rings = upward(graph), circles(graph)
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
