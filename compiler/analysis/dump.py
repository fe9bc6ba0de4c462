"""A program as plain data for JSON: what runs, what moves, what is held, and why. The schema is in docs/viewer.md."""

from __future__ import annotations

import linecache
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from shardc.compiler.analysis.explain import rule_text, source_of
from shardc.compiler.analysis.lowered import Lowered
from shardc.compiler.analysis.memory import memories
from shardc.compiler.analysis.pass_changes import changes
from shardc.compiler.analysis.work import by_place, work
from shardc.compiler.ir.flops import flops
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import local_nbytes, of, specs, target_name, tensors
from shardc.compiler.ir.signature import InputKind
from shardc.compiler.ir.text import arg_text, type_text
from shardc.compiler.ir.views import is_view
from shardc.compiler.rules.table import tensors_in
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import DTYPES, Spec

SCHEMA = "shardc.program/1"


def dump(program: Lowered, names: Mapping[str, str]) -> dict[str, Any]:
    """Everything of a program that can be shown, as dicts, lists, strings and numbers. names: what each
    placeholder is, as in the program's text."""
    mesh = program.mesh
    final = [node for node in program.gm.graph.nodes if node.op != "output"]
    return {
        "schema": SCHEMA,
        "torch": torch.__version__,
        "hash": program.hash,
        "mesh": [{"name": name, "size": size} for name, size in zip(mesh.names, mesh.shape, strict=True)],
        "nodes": [_node(node, mesh, names) for node in final],
        "returned": arg_text(program.gm.graph.output_node().args[0]),
        "reasons": _reasons(program),
        "sources": _sources(final),
        "inputs": _inputs(program, names),
        "parameters": _parameters(program),
        "plan": _plan(program),
        "collectives": [{**c._asdict(), "dtype": str(c.dtype)} for c in program.collectives()],
        "memory": _memory(program),
        "work": _work(program),
        "traced": [list(line) for line in program.records[0].found],
        "passes": [changes(record) for record in program.records],
        "notes": program.notes(),
    }


def _work(program: Lowered) -> dict[str, Any]:
    """What ranks repeat: operations of all ranks over those of one device, and where."""
    done = work(program.global_gm, program.mesh)
    places = [{"fqn": fqn, "where": where, "share": share} for fqn, where, share in by_place(done)]
    return {"repeated": done.repeated, "places": places}


def _node(node: Node, mesh: Mesh, names: Mapping[str, str]) -> dict[str, Any]:
    view, move = of(node), move_of(node)
    is_input = node.op == "placeholder"
    args = [arg_text(a) for a in node.args] + [f"{k}={arg_text(v)}" for k, v in node.kwargs.items()]
    return {
        "name": node.name,
        "op": "input" if is_input else target_name(node.target),
        "args": names.get(node.name, "input") if is_input else ", ".join(args),
        "moves": move.target.__name__ if move is not None else "",
        "type": type_text(node),
        "results": _results(node, mesh),
        "inputs": [used.name for used in node.all_input_nodes],
        "path": view.path,
        "phase": view.phase,
        "where": view.where,
        "file": _shown(view.file),
        "line": view.line,
        "made_by": view.made_by or "",
        "recompute": view.region,
        "origin": view.origin,
        "view": is_view(node),
        "bytes": local_nbytes(node, mesh),
        "flops": flops(node, mesh),
    }


def _results(node: Node, mesh: Mesh) -> list[dict[str, Any]]:
    """Each tensor a node gives; `layout` is None where it is a step inside one operator's local form."""
    values, layouts = tensors(node), specs(node)
    if not layouts or len(layouts) != len(values):
        return [_result(t, None, mesh) for t in tensors_in(of(node).local)]
    return [_result(t, s, mesh) for t, s in zip(values, layouts, strict=True)]


def _result(value: torch.Tensor, spec: Spec | None, mesh: Mesh) -> dict[str, Any]:
    dtype = DTYPES.get(value.dtype, str(value.dtype))
    if spec is None:
        local = [int(n) for n in value.shape]
        return {"dtype": dtype, "layout": None, "shape": None, "local_shape": local, "split": {}, "pending": {}}
    return {
        "dtype": dtype,
        "layout": spec.text(),
        "shape": list(spec.shape),
        "local_shape": list(spec.local_shape(mesh, mesh.coords(0))),
        "split": {axis: spec.dim_of(axis) for axis in spec.axes()},
        "pending": dict(spec.pending),
    }


def _reasons(program: Lowered) -> dict[str, dict[str, Any]]:
    """One step of the chain behind each value that some mesh dim splits, or over which it is pending. Localizing
    takes some operators apart, so the graph at global shapes is asked first."""
    nodes = {n.name: n for gm in (program.gm, program.global_gm) for n in gm.graph.nodes if n.op != "output"}
    out = {}
    for name, node in nodes.items():
        axes = [a for s in specs(node) for a in (*s.axes(), *(p[0] for p in s.pending))]
        if not axes and name in out:
            continue
        sources = {axis: source_of(node, axis) for axis in dict.fromkeys(axes)}
        out[name] = {
            "op": "input" if node.op == "placeholder" else target_name(node.target),
            "layout": str(specs(node)[0]) if specs(node) else "",
            "rule": rule_text(node),
            "why": of(node).why,
            "from": {axis: source.name if source is not None else None for axis, source in sources.items()},
        }
    return out


def _inputs(program: Lowered, names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"node": i.node, "kind": i.kind.value, "name": i.name, "is": names.get(i.node, "input")}
        for i in program.signature.inputs
    ]


def _parameters(program: Lowered) -> list[dict[str, Any]]:
    nodes = {i.name: i.node for i in program.signature.inputs if i.kind in (InputKind.PARAMETER, InputKind.BUFFER)}
    rows = []
    for row in program.plan.report():
        dtype = DTYPES.get(row["dtype"], str(row["dtype"]))
        lists = {key: list(row[key]) for key in ("shape", "keys", "aliases", "notes")}
        rows.append({**row, **lists, "dtype": dtype, "node": nodes.get(row["fqn"])})
    return rows


def _plan(program: Lowered) -> dict[str, Any]:
    report = program.plan.report()
    return {
        "text": str(report),
        "bytes": report.whole,
        "bytes_per_rank": report.total,
        "unmatched": list(report.unmatched),
        "warnings": list(report.warnings),
    }


def _memory(program: Lowered) -> dict[str, Any]:
    """Bytes over the schedule of each half, on the rank that holds most; the peak is `program.peak_bytes()`."""
    halves, found = [], memories(program.halves, program.mesh)
    for phase, memory in found.items():
        halves.append(
            {
                "phase": phase,
                "order": list(memory.order),
                "start": memory.start,
                "alive": list(memory.alive),
                "values": [list(life) for life in memory.values],
            }
        )
    peak = max(memory.peak for memory in found.values())  # what has no bound is taken as small as it can be
    return {"peak_bytes": peak, "saved": list(program.halves.saved), "halves": halves}


def _sources(nodes: Sequence[Node]) -> dict[str, str]:
    """The text of every line of the user's source that some node comes from, by `file:line`."""
    out = {}
    for node in nodes:
        file, line = of(node).file, of(node).line
        if file and line:
            out[f"{_shown(file)}:{line}"] = linecache.getline(file, line).strip()
    return out


def _shown(file: str) -> str:
    """A path as one would type it here."""
    if not os.path.isabs(file):
        return file
    here = os.path.relpath(file)
    return file if here.startswith("..") else here
