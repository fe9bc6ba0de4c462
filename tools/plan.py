"""`shardc plan`: the plan that a search finds for a target, and what comes next, in the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardc import Hardware, Mesh
from shardc.compiler.driver.decide import Options
from shardc.compiler.driver.search.budget import limit, readable
from shardc.compiler.driver.search.found import Found
from shardc.compiler.driver.search.search import Search
from shardc.tools.explain import target_parts


def plan(target: str, mesh: Mesh, hardware: str, memory: str | None, keep: bool) -> None:
    """Search, and print the plan as it would be written, and a table of the best. keep: the target's own plan is not
    changed. Raises PlanError as `search` does."""
    model, own, args, kwargs, told = target_parts(target)
    machine = Hardware.preset(hardware)
    most = limit(memory, machine.capacity)
    again = told.get("recompute") or ()
    recompute = (again,) if isinstance(again, str) else tuple(again)
    options = Options(precision=told.get("precision"), hardware=machine, recompute=recompute)
    layouts = {side: told.get(side) for side in ("inputs", "outputs")}
    console, log = Console(), Console(stderr=True)
    with log.status("") as status:

        def tell(text: str, count: int) -> None:
            status.update(f"{text} ({count} compared)" if count else text)

        found = Search(model, mesh, options, most, own if keep else None, layouts, tell).run(args, kwargs)
        table = _table(found, tell)
    console.print(Text(str(found.plan)), soft_wrap=True)
    if found.recompute:
        console.print(f"recompute={list(found.recompute)}", markup=False, highlight=False)
    console.print(table)


def _table(found: Found, tell: Any) -> Table:
    table = Table(box=SIMPLE, title=f"{found.tried} plans compared; no step is shorter than {found.bound:.4g} s")
    for name in ("seconds", "memory of a rank"):
        table.add_column(name, justify="right")
    table.add_column("plan")
    table.add_row(f"{found.seconds:.4g}", readable(found.peak_bytes), Text(str(found.plan)))
    for other in found.alternatives:
        tell("counting memory of what comes next", found.tried)
        table.add_row(f"{other.seconds:.4g}", readable(other.peak_bytes), Text(str(other.plan)))
    return table
