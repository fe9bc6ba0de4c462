"""The `shardc` command: demo, explain, run."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse and run; returns the exit code. The user's mistakes are printed, not traced."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("shardc", description="The sharding compiler for PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small GPT on 4 local ranks and compare with one device")
    demo.add_argument("--steps", type=int, default=60)
    demo.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="picture of the loss curves")
    demo.set_defaults(run=_demo)
    explain = commands.add_parser("explain", help="plan, collectives and memory of a program; or why a value lies so")
    explain.add_argument("target", help="file.py:function or package.module:function -> (model, plan, inputs)")
    explain.add_argument("value", nargs="?", help="a value's name in the program's text")
    explain.add_argument("--mesh", required=True, help="such as dp=2,tp=4; no devices are needed")
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(run=_explain)
    run = commands.add_parser("run", help="run a script on local gloo ranks")
    run.add_argument("-n", type=int, default=4, dest="ranks")
    run.add_argument("script")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    run.set_defaults(run=_run)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from shardc.tools.demo import demo

    return demo(options.steps, options.output)


def _run(options: argparse.Namespace) -> int:
    import shardc

    shardc.launch(run_script, options.ranks, (options.script, options.arguments))
    return 0


def run_script(rank: int, script: str, arguments: list[str]) -> None:
    """One rank of `shardc run`: the script as __main__, as under torchrun."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _explain(options: argparse.Namespace) -> int:
    from shardc.tools.explain import as_json, load_target, parse_mesh, show

    compiled, program = load_target(options.target, parse_mesh(options.mesh))
    if options.value:
        print(program.explain(options.value))
    elif options.json:
        print(json.dumps(as_json(compiled, program), indent=1))
    else:
        show(compiled, program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
