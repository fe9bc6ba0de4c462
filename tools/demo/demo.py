"""`shardc demo`: trains a small GPT on four local ranks and on one device, and puts the two side by side."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import shardc
from shardc.tools.demo.model import CONTEXT, GPT, next_byte_loss, plan
from shardc.tools.demo.text import Text, standard_library

DP, TP, ROWS, SEED, RATE = 2, 2, 8, 0, 1e-3
# Double precision: training multiplies rounding from step to step. In single precision, at three times this
# rate, one device differs by 0.08 nats after 60 steps from itself with each batch taken in two halves.
DTYPE = torch.float64
TOLERANCE = 1e-6  # nats


@dataclass(frozen=True)
class Run:
    """One training run: losses per step, held-out loss before and after, and what the run was made of."""

    losses: list[float]
    before: float
    after: float
    weights: dict[str, Tensor]
    collectives: list[tuple[str, str, int, int]]  # kind, mesh dim, how many, bytes per rank, in one step
    rank_bytes: list[int]
    seconds: float


def demo(steps: int = 60, picture: Path = Path("demo.png"), page: Path = Path("demo.html")) -> int:
    """Run it all; 0 if the curves agree, 1 if they differ."""
    console = Console()
    text = standard_library()
    model = GPT().to(DTYPE)
    count = sum(p.numel() for p in model.parameters())
    console.print(
        f"A GPT of {count:,} parameters, {text.files} files of Python's standard library "
        f"({len(text.train):,} bytes to train on), mesh dp={DP} x tp={TP} of gloo ranks on this machine."
    )
    sharded: Run = shardc.launch(train_rank, DP * TP, (steps, str(page)))[0]
    alone = train_alone(steps, console)
    _report(console, sharded, alone, model)
    _draw(sharded, alone, picture)
    console.print(f"loss curves: {picture}")
    console.print(f"the program, to open in a browser: {page}")
    console.print("\nA sample:\n" + _sample(sharded.weights, text), markup=False, highlight=False)
    worst = max(abs(a - b) for a, b in zip(sharded.losses, alone.losses, strict=True))
    if worst > TOLERANCE:
        console.print(f"The curves differ by {worst:.1e}, more than {TOLERANCE:.0e}.", style="red")
        return 1
    return 0


def train_rank(rank: int, steps: int, page: str) -> Run | None:
    """What each rank runs; rank 0 reports, and writes the program's page."""
    text = standard_library()
    torch.manual_seed(SEED)
    mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    model = shardc.compile(GPT().to(DTYPE), plan(), mesh=mesh)
    row = mesh.get_coordinate()[0]  # pyright: ignore[reportOptionalSubscript]
    rows = slice(row * ROWS // DP, (row + 1) * ROWS // DP)
    begin = time.perf_counter()
    losses, before, after = _train(model, text, steps, rows, _bar("4 ranks", rank == 0), mesh.get_group("dp"))
    seconds = time.perf_counter() - begin
    weights = model.full_state_dict(rank0_only=True)
    held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters())
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(DP * TP)]
    torch.distributed.all_gather(sizes, torch.tensor([held]))
    if rank:
        return None
    program = next(p for p in model.programs if any(c.phase == "backward" for c in p.collectives()))
    program.view(page, title=f"demo: GPT, dp={DP} tp={TP}")
    found: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for c in program.collectives():
        found[c.kind, c.mesh_dim] += 1
        moved[c.kind, c.mesh_dim] += c.bytes_on_wire
    table = [(kind, dim, n, moved[kind, dim]) for (kind, dim), n in found.items()]
    return Run(losses, before, after, weights, table, [int(s) for s in sizes], seconds)


def train_alone(steps: int, console: Console) -> Run:
    """The same model, seed and batches on one device, without shardc."""
    torch.manual_seed(SEED)
    model, begin = GPT().to(DTYPE), time.perf_counter()
    losses, before, after = _train(model, standard_library(), steps, slice(0, ROWS), _bar("1 device", True), None)
    return Run(losses, before, after, model.state_dict(), [], [], time.perf_counter() - begin)


def _train(
    model: nn.Module, text: Text, steps: int, rows: slice, bar: Progress, group: object
) -> tuple[list[float], float, float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses: list[float] = []
    before = _held_out(model, text, rows, group)
    with bar:
        task = bar.add_task("", total=steps)
        for step in range(steps):
            ids, targets = text.batch(step, ROWS, CONTEXT)
            loss = next_byte_loss(model(ids[rows]), targets[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(_mean(loss.detach(), group))
            bar.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
    return losses, before, _held_out(model, text, rows, group)


def _held_out(model: nn.Module, text: Text, rows: slice, group: object) -> float:
    ids, targets = text.held_out_batch(ROWS, CONTEXT)
    with torch.no_grad():
        return _mean(next_byte_loss(model(ids[rows]), targets[rows]), group)


def _mean(x: Tensor, group: object) -> float:
    """A number averaged over the data-parallel ranks."""
    if group is None:
        return x.item()
    total = x.clone()
    torch.distributed.all_reduce(total, group=group)  # pyright: ignore[reportArgumentType]
    return total.item() / DP


def _bar(name: str, shown: bool) -> Progress:
    columns = (TextColumn(f"{name:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.description}"), disable=not shown)


def _report(console: Console, sharded: Run, alone: Run, model: nn.Module) -> None:
    worst = max(abs(a - b) for a, b in zip(sharded.losses, alone.losses, strict=True))
    losses = Table("", "first loss", "last loss", "held-out before", "held-out after", "seconds")
    for name, run in (("4 ranks", sharded), ("1 device", alone)):
        values = (run.losses[0], run.losses[-1], run.before, run.after)
        losses.add_row(name, *(f"{v:.6f}" for v in values), f"{run.seconds:.1f}")
    console.print(losses)
    console.print(f"largest difference between the two loss curves: {worst:.2e}")
    moves = Table("collective", "mesh dim", "per step", "bytes per rank")
    for kind, dim, count, size in sharded.collectives:
        moves.add_row(kind, dim, str(count), f"{size:,}")
    console.print(moves)
    whole = sum(p.nbytes for p in model.parameters())
    held = ", ".join(f"rank {r}: {n:,}" for r, n in enumerate(sharded.rank_bytes))
    console.print(f"bytes of parameters: {whole:,} on one device; {held}")


def _draw(sharded: Run, alone: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(alone.losses, linewidth=4, alpha=0.35, label="one device")
    axes.plot(sharded.losses, linewidth=1.2, label=f"shardc, dp={DP} x tp={TP}")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="The same training run, sharded and not")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _sample(weights: dict[str, Tensor], text: Text, length: int = 240) -> str:
    """What the trained weights write, in the plain model: nothing of shardc is needed to use them."""
    model = GPT().to(DTYPE)
    model.load_state_dict(weights)
    draw = torch.Generator().manual_seed(1)
    ids = torch.tensor([list(b"def ")])
    with torch.no_grad():
        for _ in range(length):
            logits = model(ids[:, -CONTEXT:])[0, -1] / 0.7
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=draw)[None]], 1)
    return bytes(ids[0].tolist()).decode("utf-8", "replace")
