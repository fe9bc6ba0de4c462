"""The `shardc` command: demo, view, explain, plan, run, opt."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardc import __version__

if TYPE_CHECKING:
    from shardc import Program


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
    parser.add_argument("--version", action="version", version=f"shardc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small GPT on 4 local ranks and compare with one device")
    demo.add_argument("--steps", type=int, default=60)
    demo.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="picture of the loss curves")
    demo.add_argument("--page", type=Path, default=Path("demo.html"), help="the page that shows the program")
    demo.set_defaults(run=_demo)
    view = commands.add_parser("view", help="write a page that shows a program, or compares two")
    _add_target(view, nargs="+")
    view.add_argument("-o", "--output", type=Path, default=Path("graph.html"), help="the page (graph.html)")
    view.add_argument("--dump", type=Path, help="write the program as JSON too, to be viewed elsewhere")
    view.add_argument("--measured", type=Path, help="a torch.profiler trace of a rank, to be shown beside the estimate")
    view.add_argument("--trace", type=Path, help="write the estimated timeline too, for Perfetto or chrome://tracing")
    view.add_argument("--model-explorer", type=Path, help="write the graph too, for Google's Model Explorer")
    view.set_defaults(run=_view)
    explain = commands.add_parser("explain", help="plan, collectives and memory of a program; or why a value lies so")
    _add_target(explain)
    explain.add_argument("value", nargs="?", help="a value's name in the program's text")
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(run=_explain)
    plan = commands.add_parser("plan", help="find the plan whose step is shortest, within a limit of memory")
    plan.add_argument("target", help=TARGET)
    plan.add_argument("--mesh", help="such as dp=8,tp=8; no devices are needed")
    plan.add_argument("--memory", help="bytes of a rank, such as 80GB (what the hardware has)")
    plan.add_argument("--hardware", default="h100", help="the machine: a100, h100, h200, neutral (h100)")
    plan.add_argument("--keep", action="store_true", help="keep every line of the target's own plan, and add to it")
    plan.set_defaults(run=_plan)
    run = commands.add_parser("run", help="run a script on local gloo ranks")
    run.add_argument("-n", type=int, default=4, dest="ranks")
    run.add_argument("script")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    run.set_defaults(run=_run)
    about = argparse.RawDescriptionHelpFormatter
    opt = commands.add_parser("opt", help="run passes on a program's text", description=OPT, formatter_class=about)
    opt.add_argument("text", nargs="?", default="-", help="the file of the text (standard input)")
    opt.add_argument("--from", dest="target", help="instead: file.py:function -> (model, plan, inputs), with --mesh")
    opt.add_argument("--mesh", help="such as dp=2,tp=4; no devices are needed")
    opt.add_argument("--pass", dest="one", default="", metavar="PASS", help="run this pass")
    opt.add_argument("--until", default="", metavar="PASS|STAGE", help="run all that leads to the end of it")
    opt.add_argument("--plain", action="store_true", help="print as `print(program)` does")
    opt.add_argument("--list", action="store_true", help="name the passes, with the stages that they take and give")
    opt.set_defaults(run=_opt)
    return parser


TARGET = "file.py:function or package.module:function -> (model, plan, inputs[, options])"
OPT = """\
Runs passes on a program's text, and prints what becomes of it:

  shardc opt --from model.py:example --mesh dp=2,tp=2 --until SHARDED > program.txt
  shardc opt program.txt --pass insert-reshards
  shardc opt program.txt --until LOCAL | shardc opt --pass overlap --plain

What `print(program)` shows can be read too, as far as it goes: it says nothing of source lines, units or gradients.
docs/program_text.md has the grammar."""


def _demo(options: argparse.Namespace) -> int:
    from shardc.tools.demo.demo import demo

    return demo(options.steps, options.output, options.page)


def _plan(options: argparse.Namespace) -> int:
    from shardc.tools.explain import parse_mesh
    from shardc.tools.plan import plan

    plan(options.target, parse_mesh(options.mesh), options.hardware, options.memory, options.keep)
    return 0


def _run(options: argparse.Namespace) -> int:
    import shardc

    shardc.launch(run_script, options.ranks, (options.script, options.arguments))
    return 0


def _opt(options: argparse.Namespace) -> int:
    from shardc.compiler.driver.saved.text_passes import of_call, of_text, passes
    from shardc.tools.explain import compile_target, parse_mesh

    if options.list:
        print(*(f"{step.name:24} {step.takes.name} -> {step.gives.name}" for step in passes()), sep="\n")
        return 0
    if options.target:
        compiled, args, kwargs = compile_target(options.target, parse_mesh(options.mesh))
        program, plain = of_call(compiled, *args, **kwargs), False
    else:
        name = "standard input" if options.text == "-" else options.text
        content = sys.stdin.read() if options.text == "-" else Path(options.text).read_text(encoding="utf-8")
        takes = {step.name: step.takes.name for step in passes()}
        program, plain = of_text(content, name, takes.get(options.one, "TRACED")), "  !{" not in content
    if options.one or options.until:
        program.run(options.one, options.until)
    print(program.plain() if plain or options.plain else program.text())
    return 0


def run_script(rank: int, script: str, arguments: list[str]) -> None:
    """One rank of `shardc run`: the script as __main__, as under torchrun."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _add_target(command: argparse.ArgumentParser, **options: Any) -> None:
    command.add_argument("target", help=f"{TARGET}, or a dumped .json", **options)
    command.add_argument("--mesh", help="such as dp=2,tp=4; no devices are needed")
    links = "a100, h100, h200, nvlink=450GB/s,ib=50GB/s or tp=450GB/s,dp=50GB/s: for the estimate of the timeline"
    command.add_argument("--links", default="h100", help=links)


def _program(target: str, mesh: str | None) -> Program:
    from shardc.tools.explain import compile_target, parse_mesh

    compiled, args, kwargs = compile_target(target, parse_mesh(mesh))
    return compiled.lower(*args, **kwargs)


def _data(target: str, mesh: str | None) -> dict[str, Any]:
    """A program as plain data: from a dump, or compiled now."""
    from shardc.tools.program_json import load

    return load(target) if target.endswith(".json") else _program(target, mesh).data()


def _view(options: argparse.Namespace) -> int:
    from shardc.tools.links import parse_links
    from shardc.tools.measured import join, load_trace
    from shardc.tools.model_explorer import model_explorer
    from shardc.tools.page import page
    from shardc.tools.timeline import chrome_trace, estimate, mesh_of

    if len(options.target) > 2:
        raise ValueError("one program is shown, or two are compared")
    programs = [_data(target, options.mesh) for target in options.target]
    measured = join(programs[0], load_trace(options.measured)) if options.measured else None
    text = page(*programs, titles=options.target, links=options.links, measured=measured)
    options.output.write_text(text, encoding="utf-8")
    if options.dump:
        options.dump.write_text(json.dumps(programs[0], separators=(",", ":")), encoding="utf-8")
    if options.trace:
        timeline = estimate(programs[0], parse_links(options.links, mesh_of(programs[0])))
        options.trace.write_text(json.dumps(chrome_trace(programs[0], timeline)), encoding="utf-8")
    if options.model_explorer:
        graph = model_explorer(programs[0], options.target[0])
        options.model_explorer.write_text(json.dumps(graph), encoding="utf-8")
    print(options.output)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from shardc.tools.explain import as_json, show
    from shardc.tools.program_json import explain

    if options.value and not options.target.endswith(".json"):
        text = _program(options.target, options.mesh).explain(options.value)
        print(json.dumps({"value": options.value, "explanation": text}) if options.json else text)
        return 0
    data = _data(options.target, options.mesh)
    if options.value:
        print(explain(data, options.value))
    elif options.json:
        print(json.dumps(as_json(data, options.links), indent=1))
    else:
        show(data, options.links)
    return 0


if __name__ == "__main__":
    sys.exit(main())
