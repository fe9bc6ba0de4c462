"""Models whose source is unmodified, compiled for data parallel, parameter-sharded and their own tensor-parallel plan.

    python benchmarks/model_zoo.py [--models PATTERN] [--ranks 2] [--json FOLDER] [--table PATH] [--head LINE]

Each is compiled for simulated ranks and compared with the same model on one device: every output, the loss, every
gradient, and what it changes of its buffers; in float64 where its operators take that, and in train mode, so that
dropout is on and must draw alike.
One JSON per model is kept in FOLDER, and a model that has one is not run again. With --table nothing runs: the table
of what FOLDER holds is written, with a line at its top for the machine.
"""

import argparse
import copy
import fnmatch
import json
import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from models.zoo_models import MODELS, Missing
from torch import Tensor, nn

import shardc
from shardc import Mesh, PlanError, ShardingError

# How far apart two values may be: of a tensor's largest element, and of the model's largest gradient, as what cancels
# leaves rounding alone. In float64 too some models compute parts in float32.
CLOSE = {"torch.float64": (1e-5, 1e-7), "torch.float32": (2e-4, 1e-5)}
FAULT = "fault of the compiler"
WORST = ("", "right", "refused", "error", "wrong")


class NotGiven(Exception):
    """A model has no plan of a kind."""


# ---- the three ways


def data_parallel(model: nn.Module, ranks: int) -> nn.Module:
    return shardc.compile(shardc.replicate(model), mesh=Mesh(dp=ranks), rng="replay")


def parameter_sharded(model: nn.Module, ranks: int) -> nn.Module:
    for block in blocks(model):
        shardc.fully_shard(block)
    return shardc.compile(shardc.fully_shard(model), mesh=Mesh(dp=ranks), rng="replay")


def tensor_parallel(model: nn.Module, ranks: int) -> nn.Module:
    plan = dict(getattr(model, "tp_plan", None) or {})
    if not plan:
        raise NotGiven
    return shardc.compile(model, shardc.Plan(tp=plan), mesh=Mesh(tp=ranks), rng="replay")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of every list of modules that lies in no other, as a user would shard them."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
    return [block for name in outer for block in model.get_submodule(name).children()]  # type: ignore[union-attr]


WAYS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "data parallel": data_parallel,
    "parameter-sharded": parameter_sharded,
    "its own tp_plan": tensor_parallel,
}


# ---- one model


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    """Every output, gradient and buffer, by name, after a backward of the loss, or of fixed numbers at the outputs."""
    torch.manual_seed(3)
    given = {k: v.clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
             for k, v in inputs.items()}  # fmt: skip
    positional = [given.pop("x")] if "x" in given else []
    value = model(*positional, **given)
    leaves = {pytree.keystr(path): x for path, x in pytree.tree_flatten_with_path(value)[0] if isinstance(x, Tensor)}
    loss = getattr(value, "loss", None)
    ends = [loss] if isinstance(loss, Tensor) else [x for x in leaves.values() if x.requires_grad]
    draw = torch.Generator().manual_seed(1)
    torch.autograd.backward(ends, [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in ends])
    found: dict[str, Tensor | None] = {f"output{name}": x.detach() for name, x in leaves.items()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    grads = {k: v for k, v in {**inputs, **given}.items() if isinstance(v, Tensor)}
    found |= {f"gradient of {name}": x.grad for name, x in grads.items()}
    return found | {f"buffer {name}": b for name, b in model.named_buffers()}


def difference(have: dict[str, Tensor | None], want: dict[str, Tensor | None], close: tuple[float, float]) -> str:
    """The first value that differs beyond rounding, or nothing."""
    if have.keys() != want.keys():
        return f"other values: {sorted(have.keys() ^ want.keys())[:3]}"
    largest = max((size(x) for name, x in want.items() if name.startswith("gradient")), default=0.0)
    for name, y in want.items():
        x = have[name]
        if x is None or y is None:
            if x is not y:
                return f"{name} is {'missing' if x is None else 'there'}"
        elif x.shape != y.shape or x.dtype != y.dtype:
            return f"{name} is {x.dtype}{list(x.shape)} instead of {y.dtype}{list(y.shape)}"
        elif y.numel():
            of_itself, of_all = close
            near = of_itself * size(y) + of_all * (largest if name.startswith("gradient") else 1)
            if not y.is_floating_point() and not torch.equal(x, y):
                return f"{name} has other integers"
            if not torch.allclose(x.double(), y.double(), rtol=0, atol=near, equal_nan=True):
                return f"{name} is off by {(x - y).abs().max().item():.1e}, its largest being {size(y):.1e}"
    return ""


def size(x: Tensor | None) -> float:
    return 0.0 if x is None or not x.numel() else x.detach().double().nan_to_num().abs().max().item()


def judged(model: nn.Module, inputs: dict[str, Any], want: dict, way: str, ranks: int) -> dict[str, Any]:
    begin, program = time.perf_counter(), None
    try:
        compiled: Any = WAYS[way](copy.deepcopy(model), ranks)
        dtype = next(str(p.dtype) for p in model.parameters())
        text = difference(results(compiled, inputs), want, CLOSE[dtype])
        verdict, program = ("wrong" if text else "right"), compiled.programs[-1]
    except NotGiven:
        verdict, text = "", "has none"
    except (PlanError, ShardingError) as error:
        verdict, text = ("error" if FAULT in str(error) else "refused"), str(error)
    except Exception as error:
        verdict, text = "error", f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()[-1500:]}"
    moved = dict(Counter(c[0] for c in program.collectives())) if program else {}
    seconds = round(time.perf_counter() - begin, 1)
    return {"verdict": verdict, "text": text, "collectives": moved, "seconds": seconds}


def tried(name: str, ranks: int, only: str) -> dict[str, Any]:
    """What became of one model, by way."""
    torch.manual_seed(0)
    try:
        model, inputs = MODELS[name]()
    except Missing as error:
        return {"model": name, "skipped": str(error)}
    model.train()
    for dtype in (torch.float64, torch.float32):
        cast = copy.deepcopy(model).to(dtype)
        given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        try:
            want = results(copy.deepcopy(cast), given)
            break
        except (RuntimeError, NotImplementedError, ValueError) as error:
            alone = error  # some operators take no float64
    else:
        return {"model": name, "skipped": f"does not run on one device: {str(alone)[:200]}"}
    count = sum(p.numel() for p in model.parameters())
    found = {w: judged(cast, given, want, w, ranks) for w in WAYS if fnmatch.fnmatch(w, only)}
    about = {"class": type(model).__name__, "parameters": count, "ranks": ranks, "dtype": str(dtype)}
    return {"model": name, **about, "ways": found}


# ---- what is shown


def table(rows: list[dict[str, Any]], head: str) -> str:
    lines = [head, "", "| model | class | parameters | " + " | ".join(WAYS) + " |", "|---" * (3 + len(WAYS)) + "|"]
    said = []
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['model']} | {row['skipped']} | |" + " |" * len(WAYS))
            continue
        cells = [_cell(row["ways"][way]) for way in WAYS]
        lines.append(f"| {row['model']} | `{row['class']}` | {row['parameters']:,} | {' | '.join(cells)} |")
        for way, found in row["ways"].items():
            if found["verdict"] not in ("", "right"):
                said += ["", f"{row['model']}, {way}: {found['verdict']}", "", "```", found["text"].strip(), "```"]
    return "\n".join([*lines, *(["", "## What is said where a model is not right", *said] if said else [])]) + "\n"


def _cell(found: dict[str, Any]) -> str:
    if found["verdict"] != "right":
        return found["verdict"] or found["text"]
    moved = ", ".join(f"{n} {kind}" for kind, n in found["collectives"].items())
    return f"right ({moved})" if moved else "right"


def line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['model']:26} {row['skipped']}"
    cells = [f"{w}: {f['verdict'] or f['text']} ({f['seconds']} s)" for w, f in row["ways"].items()]
    bad = [f"\n    {f['text'][:1500]}" for f in row["ways"].values() if f["verdict"] not in ("", "right")]
    return f"{row['model']:26} {'  '.join(cells)}{''.join(bad)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="*", help="patterns of names, split by commas")
    parser.add_argument("--way", default="*", help="a pattern: " + ", ".join(WAYS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", default="", help="folder of one JSON per model")
    parser.add_argument("--table", default="", help="write the table of that folder here, and run nothing")
    parser.add_argument("--head", default="", help="first line of the table: date, machine, command")
    options = parser.parse_args()
    kept = Path(options.json) if options.json else None
    if options.table and kept:
        rows = [json.loads((kept / f"{name}.json").read_text()) for name in MODELS if (kept / f"{name}.json").exists()]
        Path(options.table).write_text(table(rows, options.head))
        return
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    worst = ""
    for name in MODELS:
        path = kept / f"{name}.json" if kept else None
        if not any(fnmatch.fnmatch(name, p) for p in options.models.split(",")) or (path and path.exists()):
            continue
        torch.compiler.reset()
        row = tried(name, options.ranks, options.way)
        worst = max([worst, *(f["verdict"] for f in row.get("ways", {}).values())], key=WORST.index)
        if path:
            path.write_text(json.dumps(row, indent=1))
        print(line(row), flush=True)
    if worst == "wrong":
        sys.exit("some are silently wrong")


if __name__ == "__main__":
    main()
