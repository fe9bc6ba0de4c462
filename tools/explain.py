"""`shardc explain`: the plan as resolved, what moves, what each rank holds, in the terminal or as JSON."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

import shardc
from shardc import Mesh
from shardc.compiler.driver.fill import ON_META
from shardc.compiler.spec.hardware import Hardware
from shardc.tools.links import LEFT_OUT, parse_links
from shardc.tools.links import as_json as machine_json
from shardc.tools.timeline import Timeline, estimate, mesh_of


def parse_mesh(text: str | None) -> Mesh:
    """`dp=2,tp=4` as an abstract mesh. Raises ValueError for other text."""
    if text is None:
        raise ValueError("--mesh is missing: write --mesh dp=2,tp=4")
    try:
        return Mesh(**{name: int(size) for name, size in (part.split("=") for part in text.split(","))})
    except (ValueError, TypeError) as error:
        raise ValueError(f"--mesh {text!r}: write it as dp=2,tp=4 ({error})") from None


def compile_target(target: str, mesh: Mesh) -> tuple[shardc.CompiledModule, tuple[Any, ...], dict[str, Any]]:
    """What `file.py:function` or `package.module:function` returns, (model, plan, example inputs) and if it likes a
    dict of compile's options: the compiled model, and the inputs as positional and keyword arguments. What is on meta,
    or from deferred_init, takes no memory: nothing is computed."""
    model, plan, args, kwargs, options = target_parts(target)
    return shardc.compile(model, plan, mesh=mesh, init=ON_META, **options), args, kwargs


def target_parts(target: str) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """What a target returns: model, plan, positional and keyword arguments, compile's options."""
    model, plan, inputs, *rest = _function(target)()
    options = {key: value for key, value in (rest[0] if rest else {}).items() if key not in ("init", "mesh")}
    if isinstance(inputs, dict):
        return model, plan, (), inputs, options
    return model, plan, inputs if isinstance(inputs, tuple) else (inputs,), {}, options


def _function(target: str) -> Callable[[], Any]:
    place, _, name = target.rpartition(":")
    if not place:
        raise ValueError(f"{target!r}: write file.py:function, package.module:function, or the name of a dumped .json")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("shardc_target", place)
        if spec is None or spec.loader is None:
            raise ValueError(f"{place} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # tracing looks up where the model's globals are
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise ValueError(f"{place} has no function {name}")
    return getattr(module, name)


def show(data: dict[str, Any], links: str) -> None:
    """Print the plan report, the collectives, the memory, the estimate, and what there is to be warned of."""
    console = Console()
    console.print(data["plan"]["text"], markup=False, highlight=False)
    console.print(_totals_table(data))
    console.print(_collectives_table(data["collectives"]))
    console.print(_memory_table(data))
    console.print(_work_table(data["work"]))
    used = parse_links(links, mesh_of(data))
    console.print(_estimate_table(estimate(data, used), used, mesh_of(data)))
    for text in LEFT_OUT:
        console.print(f"  left out: {text}", markup=False, highlight=False, style="dim")
    for text in (*data["plan"]["warnings"], *(f"matches nothing: {key}" for key in data["plan"]["unmatched"])):
        console.print(Text("warning: ", style="yellow") + Text(text))
    for note in data["notes"]:
        console.print(f"note: {note}", markup=False)


def totals(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Collectives by kind, mesh dim and phase: how many, and their bytes on the wire per rank."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for c in data["collectives"]:
        key = (c["kind"], c["mesh_dim"], c["phase"])
        names = dict(zip(("kind", "mesh_dim", "phase"), key, strict=True))
        row = found.setdefault(key, {**names, "number": 0, "bytes_on_wire": 0})
        row["number"] += 1
        row["bytes_on_wire"] += c["bytes_on_wire"]
    return list(found.values())


def memory(data: dict[str, Any]) -> dict[str, int]:
    """Bytes per rank: parameters, what forward leaves for backward, and the peak of each half."""
    halves = {half["phase"]: half for half in data["memory"]["halves"]}
    inputs = {i["node"] for i in data["inputs"]}
    sizes = {n["name"]: n["bytes"] for n in data["nodes"]}
    out = {"parameters": data["plan"]["bytes_per_rank"]}
    out["saved for backward"] = sum(sizes.get(name, 0) for name in data["memory"]["saved"] if name not in inputs)
    out |= {f"peak of {phase}": max([half["start"], *half["alive"]]) for phase, half in halves.items()}
    return {**out, "peak": data["memory"]["peak_bytes"]}


def _totals_table(data: dict[str, Any]) -> Table:
    table = Table("kind", "mesh dim", "phase", title="What moves, per rank and step", title_justify="left")
    table.add_column("number", justify="right")
    table.add_column("bytes on the wire", justify="right")
    for row in totals(data):
        table.add_row(row["kind"], row["mesh_dim"], row["phase"], f"{row['number']:,}", f"{row['bytes_on_wire']:,}")
    moved = sum(c["bytes_on_wire"] for c in data["collectives"])
    table.add_section()
    table.add_row("all", "", "", f"{len(data['collectives']):,}", f"{moved:,}")
    return table


def _collectives_table(collectives: list[dict[str, Any]]) -> Table:
    title = "Where, and why; numbered modules that do the same are one row"
    table = Table("collective", "phase", title=title, title_justify="left", box=SIMPLE)
    table.add_column("elements", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("module, source, reason")
    for c, number in folded(collectives):
        dtype = c["dtype"].removeprefix("torch.")
        times = f" x{number}" if number > 1 else ""
        place = "\n".join(filter(None, (c["fqn"] or "the root", c["where"], c["why"])))
        row = (f"{c['kind']} {c['mesh_dim']}{times}", c["phase"], f"{dtype} {c['numel']:,}", f"{c['bytes_on_wire']:,}")
        table.add_row(*map(Text, (*row, place)))
    return table


def folded(collectives: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Collectives that differ only in the numbers of their modules, once, with how many there are."""
    found: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}
    for c in collectives:
        alike = {**c, "fqn": _starred(c["fqn"], c["fqn"]), "why": _starred(c["why"], c["fqn"])}
        key = tuple(value for name, value in alike.items() if name != "name")
        found[key] = (alike, found[key][1] + 1 if key in found else 1)
    return list(found.values())


def _starred(text: str, fqn: str) -> str:
    """A text with the FQN's numbered path, written with dots or underscores, made a pattern."""
    parts = fqn.split(".")
    for end in range(len(parts), 0, -1):
        if not parts[end - 1].isdigit():
            continue
        for join in (".", "_"):
            stars = join.join("*" if part.isdigit() else part for part in parts[:end])
            text = text.replace(join.join(parts[:end]), stars)
    return text


def _memory_table(data: dict[str, Any]) -> Table:
    table = Table("memory of the fullest rank", title_justify="left")
    table.add_column("bytes", justify="right")
    for name, size in memory(data).items():
        table.add_row(name, f"{size:,}")
    return table


def _work_table(work: dict[str, Any]) -> Table:
    table = Table("operations of all ranks over those of one device; what repeats", title_justify="left")
    table.add_column(f"{work['repeated']:.2f}", justify="right")
    for place in work["places"][:10]:
        table.add_row(Text(f"{place['fqn']}\n{place['where']}"), f"{place['share']:.1%}")
    return table


def _estimate_table(timeline: Timeline, machine: Hardware, mesh: Mesh) -> Table:
    links = {dim: machine.link(mesh, dim) for dim in mesh}
    carried = ", ".join(f"{dim} over {link} at {rate / 1e9:g} GB/s" for dim, (link, rate) in links.items())
    table = Table(f"estimate for {machine.name}: {carried}")
    table.add_column("seconds", justify="right")
    for name, value in seconds(timeline).items():
        table.add_row(name, f"{value:.6f}")
    return table


def seconds(timeline: Timeline) -> dict[str, float]:
    """What an estimate comes to."""
    return {
        "step": timeline.seconds,
        "communication": timeline.communication,
        "exposed communication": timeline.waiting,
    }


def as_json(data: dict[str, Any], links: str) -> dict[str, Any]:
    """The same as data."""
    used = parse_links(links, mesh_of(data))
    return {
        "schema": 1,
        "mesh": {dim: mesh_of(data)[dim] for dim in mesh_of(data)},
        "collectives": data["collectives"],
        "totals": totals(data),
        "peak_bytes": data["memory"]["peak_bytes"],
        "memory": memory(data),
        "work": data["work"],
        "estimate": {**seconds(estimate(data, used)), "links": machine_json(used, mesh_of(data))},
        "warnings": data["plan"]["warnings"],
        "notes": data["notes"],
        "plan": data["plan"]["text"],
    }
