"""`shardc explain`: the plan as resolved, what moves, what each rank holds, in the terminal or as JSON."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

import shardc
from shardc import CompiledModule, Mesh, Program


def parse_mesh(text: str) -> Mesh:
    """`dp=2,tp=4` as an abstract mesh. Raises ValueError for other text."""
    try:
        return Mesh(**{name: int(size) for name, size in (part.split("=") for part in text.split(","))})
    except (ValueError, TypeError) as error:
        raise ValueError(f"--mesh {text!r}: write it as dp=2,tp=4 ({error})") from None


def load_target(target: str, mesh: Mesh) -> tuple[CompiledModule, Program]:
    """Compile what `file.py:function` or `package.module:function` returns: (model, plan, example inputs)."""
    model, plan, inputs = _function(target)()
    compiled = shardc.compile(model, plan, mesh=mesh)
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    return compiled, compiled.lower(*args, **kwargs)


def _function(target: str) -> Callable[[], Any]:
    place, _, name = target.rpartition(":")
    if not place:
        raise ValueError(f"{target!r}: write file.py:function or package.module:function")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("shardc_target", place)
        if spec is None or spec.loader is None:
            raise ValueError(f"{place} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise ValueError(f"{place} has no function {name}")
    return getattr(module, name)


def show(compiled: CompiledModule, program: Program) -> None:
    """Print the plan report, the collectives, the memory and what the passes had to say."""
    console = Console()
    console.print(str(compiled.plan.report()), markup=False, highlight=False)
    table = Table("collective", "mesh dim", "phase", "dtype", "elements", "bytes", "module", "where")
    for c in program.collectives():
        row = (
            c.kind,
            c.mesh_dim,
            c.phase,
            str(c.dtype),
            f"{c.numel:,}",
            f"{c.bytes_on_wire:,}",
            c.fqn,
            c.where,
        )
        table.add_row(*row)
    console.print(table)
    console.print(f"peak bytes per rank: {program.peak_bytes():,}")
    for note in program.notes():
        console.print(f"note: {note}", markup=False)


def as_json(compiled: CompiledModule, program: Program) -> dict[str, Any]:
    """The same as data."""
    return {
        "schema": 1,
        "mesh": dict(zip(program.mesh.names, program.mesh.shape, strict=True)),
        "collectives": [{**c._asdict(), "dtype": str(c.dtype)} for c in program.collectives()],
        "peak_bytes": program.peak_bytes(),
        "notes": program.notes(),
        "plan": str(compiled.plan.report()),
    }
