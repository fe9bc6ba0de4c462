"""Every operator of torch's own test database, sharded every way: right, refused or wrong, for shardc and for DTensor.

    python benchmarks/operators/op_coverage.py [--ops PATTERN] [--shard I/N] [--samples 3] [--layouts 6] [--uneven]
                                     [--dtensor] [--json FOLDER] [--table PATH]

For every OpInfo of `torch.testing._internal.common_methods_invocations.op_db`: a few of its samples, in float32
where it takes that; every tensor argument replicated or sharded on any dim over 4 simulated ranks, all combinations
of a few or a drawn few of many; forward and backward, against plain torch. What differs by more than a tolerance is
still right, and counted as `rounded`, where it is off by at most twice as much as plain torch from the same numbers
in float64. The sizes S, M, L of the database are set
to multiples of 4, or with --uneven left as they are. One JSON per operator is kept in FOLDER, and an operator that
has one is not run again, so that a run can be stopped, sliced and resumed. With --table nothing runs: the table of
what FOLDER holds is written, with a line at its top for the machine.
"""

import argparse
import contextlib
import fnmatch
import functools
import itertools
import json
import logging
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sharded_op import CONTENDERS, RANKS, Case, Layout, compared, judged, layouts

EVEN = {"XS": 4, "S": 4, "M": 8, "L": 16}
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64)
UNINITIALISED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
BEYOND = ("_segment_reduce.offsets",)  # whose offsets point past the data at the sizes that are set
LARGEST = 100_000  # elements of a sample's tensors
SECONDS = 150  # for one operator
RANDOM, NO_SAMPLE = "random or uninitialised", "no sample"
WORST = ("right", "refused", "error", "wrong")


class Slow(BaseException):
    """One operator took more than its time."""


# ---- one operator


def samples(op: Any, most: int) -> list[Case]:
    """A few of an operator's samples, spread over those that are small and have something to split."""
    dtype = next((d for d in DTYPES if d in op.supported_dtypes("cpu")), None)
    if dtype is None:
        return []
    grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    torch.manual_seed(0)
    drawn = itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=grad), 60)
    cases = []
    with contextlib.suppress(RuntimeError, ValueError, IndexError):  # some do not fit the sizes that were set
        for sample in drawn:
            cases.append(Case.of(op, sample))
    dense = [c for c in cases if all(x.layout is torch.strided and not x.is_nested for x in c.tensors)]
    small = [c for c in dense if sum(x.numel() for x in c.tensors) <= LARGEST]
    split = [c for c in small if any(s >= RANKS for x in c.tensors for s in x.shape)] or small
    spread = [split[i * (len(split) - 1) // max(most - 1, 1)] for i in range(min(most, len(split)))]
    return [case for case in spread if _runs(case)]


def _runs(case: Case) -> bool:
    """Whether plain torch takes the sample, a few do not fit the sizes that were set, and gives dense tensors."""
    try:
        result = case.alone(any(x.requires_grad for x in case.tensors))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return all(x.layout is torch.strided for x in result.outputs if isinstance(x, torch.Tensor))


def _varies(case: Case) -> bool:
    """Whether plain torch gives another result now and then: few numbers that fractional pooling draws change any."""
    once = case.alone(False)
    return any(compared(once, case.alone(False)) for _ in range(10))


def swept(op: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What became of one operator, by contender."""
    beyond = not options.uneven and full_name(op) in BEYOND
    cases = [] if beyond else samples(op, options.samples)
    out: dict[str, Any] = {"op": full_name(op), "samples": len(cases), "layouts": 0}
    if not cases:
        return out | {"skipped": NO_SAMPLE}
    if op.name in UNINITIALISED or any(map(_varies, cases)):
        return out | {"skipped": RANDOM}
    chosen = [layouts(case, options.layouts, not options.uneven, out["op"]) for case in cases]
    out["layouts"] = sum(map(len, chosen))
    for name in ("shardc", *(["dtensor"] if options.dtensor else [])):
        tally = out[name] = {"forward": "right", "both": "right", "rounded": 0, "problems": []}
        try:
            with at_most(SECONDS):
                for number, case in enumerate(cases):
                    _one(tally, CONTENDERS[name], case, chosen[number], number)
        except Slow:
            slow = {"verdict": "error", "text": f"more than {SECONDS} s", "inputs": "", "sample": 0}
            tally |= {"forward": "error", "both": "error", "problems": [slow]}
    return out


def _one(tally: dict[str, Any], contender: Any, case: Case, chosen: Sequence[Layout], number: int) -> None:
    """Forward and backward together; where that is not right, forward alone as well."""
    training = any(x.requires_grad for x in case.tensors)
    want, run = case.alone(training), contender(case, training)
    plain, run_plain = case.alone(False), contender(case, False)
    exact, exact_plain = (functools.cache(functools.partial(case.exact, grad)) for grad in (training, False))
    for layout in chosen:
        verdict, text = judged(run, layout, want, exact)
        if verdict == "right":
            tally["rounded"] += bool(text)
            continue
        forward = judged(run_plain, layout, plain, exact_plain)[0] if training else verdict
        for key, found in (("both", verdict), ("forward", forward)):
            tally[key] = max(tally[key], found, key=WORST.index)
        if len(tally["problems"]) < 8:
            shapes = ", ".join(f"{list(x.shape)} {p}" for x, p in zip(case.tensors, layout, strict=True))
            where = "" if forward != "right" else " (backward)"
            tally["problems"].append({"verdict": verdict + where, "sample": number, "inputs": shapes, "text": text})


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def database(even: bool) -> list[Any]:
    """op_db, its size constants set to multiples of the ranks where sizes shall be even."""
    from torch.testing._internal import common_methods_invocations
    from torch.testing._internal.common_methods_invocations import op_db

    # Else each call of a random operator would draw the same numbers, and it could not be told.
    vars(common_methods_invocations)["wrapper_set_seed"] = lambda op, *args, **kwargs: op(*args, **kwargs)
    if even:
        for name, module in list(sys.modules.items()):
            if name.startswith("torch.testing._internal"):
                for constant, size in EVEN.items():
                    if isinstance(getattr(module, constant, None), int):
                        setattr(module, constant, size)
    return sorted(op_db, key=full_name)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    part, parts = map(int, options.shard.split("/"))
    patterns = options.ops.split(",")
    known = database(not options.uneven)
    chosen = [op for op in known if any(fnmatch.fnmatch(full_name(op), pattern) for pattern in patterns)]
    results = []
    for op in chosen[part::parts]:
        kept = Path(options.json, f"{full_name(op)}.json") if options.json else None
        if kept is not None and kept.exists():
            results.append(json.loads(kept.read_text()))
            continue
        start = time.perf_counter()
        torch.compiler.reset()
        result = swept(op, options)
        result["seconds"] = round(time.perf_counter() - start, 1)
        results.append(result)
        if kept is not None:
            kept.write_text(json.dumps(result, indent=1))
        print(line(result), flush=True)
    return results


# ---- what is shown


def line(result: dict[str, Any]) -> str:
    found = [f"{n}: {result[n]['forward']}/{result[n]['both']}" for n in CONTENDERS if n in result]
    text = next((p["text"] for p in result.get("shardc", {}).get("problems", [])), "")
    return f"{result['op']:45} {result.get('skipped') or '  '.join(found)}  {result['seconds']} s  {text[:150]!r}"


def summary(results: Sequence[dict[str, Any]], name: str) -> list[tuple[str, int, int]]:
    """(verdict, operators in forward, operators in forward and backward)."""
    found = [r[name] for r in results if name in r]
    forward, both = Counter(r["forward"] for r in found), Counter(r["both"] for r in found)
    return [(verdict, forward[verdict], both[verdict]) for verdict in WORST]


def table(results: Sequence[dict[str, Any]], head: str) -> str:
    """The page: counts, and every operator that is not right everywhere."""
    names = [n for n in CONTENDERS if any(n in r for r in results)]
    tested = [r for r in results if "skipped" not in r]
    skipped = {why: [r["op"] for r in results if r.get("skipped") == why] for why in (RANDOM, NO_SAMPLE)}
    rows = [head, "", f"{len(tested)} operators tested, {sum(r['layouts'] for r in tested)} layouts.", ""]
    for name in names:
        count = sum(name in r for r in results)
        rows += [f"| {name}: {count} operators | forward | forward and backward |", "|---|---|---|"]
        rows += [f"| {v} | {f} ({100 * f / count:.1f}%) | {b} ({100 * b / count:.1f}%) |" for v, f, b in
                 summary(results, name)]  # fmt: skip
        rows.append("")
    rounded = [f"{r['op']} ({n})" for r in tested if (n := r["shardc"].get("rounded", 0))]
    if rounded:
        rows += [f"Right by float64, off by rounding, with as many layouts: {', '.join(rounded)}.", ""]
    rows += ["| operator | " + " | ".join(names) + " | shardc says |", "|---" * (len(names) + 2) + "|"]
    for r in tested:
        found = [r[n]["both"] if n in r else "" for n in names]
        if r["shardc"]["both"] != "right":
            said = r["shardc"]["problems"][0]["text"].splitlines()[0].replace("|", "\\|")[:160]
            rows.append(f"| {r['op']} | {' | '.join(found)} | {said} |")
    rows += ["", *(f"Left out, {why}: {', '.join(ops)}." for why, ops in skipped.items() if ops)]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default="*", help="patterns of operator names, split by commas")
    parser.add_argument("--shard", default="0/1", help="every N-th operator from the I-th: I/N")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--layouts", type=int, default=6, help="at most so many per sample")
    parser.add_argument("--uneven", action="store_true", help="the database's own sizes")
    parser.add_argument("--dtensor", action="store_true", help="DTensor too")
    parser.add_argument("--json", default="", help="folder of one JSON per operator")
    parser.add_argument("--table", default="", help="write the table of that folder here, and run nothing")
    parser.add_argument("--head", default="", help="first line of the table: date, machine, command")
    options = parser.parse_args()
    if options.table:
        results = [json.loads(path.read_text()) for path in sorted(Path(options.json).glob("*.json"))]
        Path(options.table).write_text(table(results, options.head))
        return
    if options.json:
        Path(options.json).mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    results = sweep(options)
    print(*summary(results, "shardc"), sep="\n")
    if any(r["shardc"]["both"] == "wrong" for r in results if "shardc" in r):
        sys.exit("some are silently wrong")


if __name__ == "__main__":
    main()
