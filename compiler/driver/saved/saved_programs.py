"""Traced modules kept by the calls they serve, and written to a file: a process that loads it does not trace.

What the file holds is the module as traced, before anything is decided; passes run again where it is loaded.
It is JSON, with the mesh, the plan and digests of the module it was made for: another one is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardc.compiler.driver.saved.fingerprint import fingerprint
from shardc.compiler.errors import PlanError
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.graph_data import from_data, to_data
from shardc.compiler.ir.signature import Reads, Traced
from shardc.compiler.spec.mesh import Mesh

FORMAT = "shardc programs 2"
MADE = 128  # traces that are kept; a program may need two
REBUILD = "compile and save again, or leave load_programs out: the module is then traced at its first call"


@dataclass
class Traces:
    """By the key of a call: what tracing gave, or its data, read when it is asked for. hashes: of the programs
    that a loaded file promises, by the key of call and variant. reads: of the module, as that file was made for it."""

    made: dict[str, Traced] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    reads: Reads | None = None

    def find(self, key: str) -> Traced | None:
        """A copy that its user may change."""
        if key in self.loaded:
            try:
                loaded = from_data(self.loaded.pop(key))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise PlanError(
                    f"a saved program is not of the form that this version reads: {error}", help=REBUILD
                ) from error
            self.made[key] = replace(loaded, signature=replace(loaded.signature, reads=self.reads))
        found = self.made.get(key)
        if found is None or not found.signature.holds():
            return None
        return Traced(copy_graph(found.gm), found.signature)

    def keep(self, key: str, traced: Traced) -> None:
        self.made[key] = Traced(copy_graph(traced.gm), traced.signature)
        if len(self.made) > MADE:
            del self.made[next(iter(self.made))]

    def check(self, key: str, made: str) -> None:
        """Raises PlanError where the program made for a call is another than its file promises."""
        if self.reads is not None and self.reads.hold() and self.hashes.get(key, made) != made:
            raise PlanError("the program made from the loaded file is not the one that was saved", help=REBUILD)


def save(path: str | os.PathLike[str], traces: Traces, programs: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Write aside, then switch: a file under this name is always whole."""
    held = {key: to_data(traced) for key, traced in traces.made.items() if traced.signature.holds()} | traces.loaded
    content = {"format": FORMAT, **about, "traces": held, "programs": {**traces.hashes, **programs}}
    text = json.dumps({**content, "digest": _digest(content)})
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def load(path: str | os.PathLike[str], traces: Traces, about: Mapping[str, Any], reads: Reads) -> None:
    """Take in what `save` wrote. Raises PlanError where the file is damaged, or was made for another mesh, plan,
    module or version; OSError where there is none."""
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_bytes())
        kind, digest = content["format"], content.pop("digest")
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{name} is no file of saved programs, or is damaged: {error}", help=REBUILD) from None
    if kind != FORMAT:
        raise PlanError(f"{name} holds {kind!r}, and this version reads {FORMAT!r}", help=REBUILD)
    if digest != _digest(content):
        raise PlanError(f"{name} is damaged: its content is not what was saved", help=REBUILD)
    _check_made_for(name, content, about)
    traces.loaded.update(content["traces"])
    traces.hashes.update(content["programs"])
    traces.reads = reads


def about(module: nn.Module, mesh: Mesh, plan: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a file is made for: all that decides over a program beside the calls."""
    return {
        "versions": {"shardc": version("shardc"), "torch": torch.__version__},
        "mesh": {name: mesh[name] for name in mesh.names},
        "plan": str(plan).splitlines(),
        "options": {key: str(value) for key, value in options.items()},
        "module": fingerprint(module),
    }


def _check_made_for(name: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if saved["mesh"] != here["mesh"] or list(saved["mesh"]) != list(here["mesh"]):
        was, now = (", ".join(f"{k}={v}" for k, v in m.items()) for m in (saved["mesh"], here["mesh"]))
        raise PlanError(f"{name} holds programs for a mesh of {was}, and this one is {now}", help=REBUILD)
    for kind in ("versions", "options", "module"):
        was, now = saved[kind], here[kind]
        for key in [*was, *now]:
            if was.get(key) != now.get(key):
                changed = "is another" if kind == "module" else f"was {was.get(key)} and is {now.get(key)}"
                raise PlanError(f"{name} was saved for something else: {key} {changed}", help=REBUILD)
    for was, now in zip(saved["plan"], here["plan"], strict=False):
        if was != now:
            raise PlanError(
                f"{name} was saved under another plan: {was.strip()!r} against {now.strip()!r}", help=REBUILD
            )
    if len(saved["plan"]) != len(here["plan"]):
        raise PlanError(f"{name} was saved under another plan, of other parameters", help=REBUILD)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
