"""Traced modules kept by the calls they serve, and written to a file: a process that loads it does not trace.

What the file holds is the text of the module as traced, before anything is decided, and the tensors that tracing met;
passes run again where it is loaded. Beside that stand the mesh, the plan and digests of the module it was made for:
another one is refused by name. Nothing in a file is run (`ir/text/reader`).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardc.compiler.driver.saved.fingerprint import fingerprint
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.ir.graph import copy_graph, placeholders
from shardc.compiler.ir.node import val
from shardc.compiler.ir.signature import InputKind, Reads, Traced
from shardc.compiler.ir.text.full import full_text
from shardc.compiler.ir.text.reader import read
from shardc.compiler.spec.mesh import Mesh

FORMAT = "shardc programs 3"
FORM = {
    "format": str, "about": {"": str}, "programs": {"": str}, "traces": {"": {"text": [str], "tensors": {"": str}}},
}  # fmt: skip
MADE = 128  # traces that are kept; a program may need two
REBUILD = "compile and save again, or leave load_programs out: the module is then traced at its first call"


@dataclass
class Traces:
    """By the key of a call: what tracing gave, or its text and tensors, read when it is asked for. hashes: of the
    programs that a loaded file promises, by the key of call and variant. reads: of the module, as that file was made
    for it."""

    made: dict[str, Traced] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    reads: Reads | None = None

    def find(self, key: str) -> Traced | None:
        """A copy that its user may change."""
        if key in self.loaded:
            loaded = _traced(**self.loaded.pop(key))
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


def save(path: str | os.PathLike[str], traces: Traces, programs: Mapping[str, str], about: Mapping[str, str]) -> None:
    """Write aside, then switch: a file under this name is always whole."""
    held = {key: _data(traced) for key, traced in traces.made.items() if traced.signature.holds()} | traces.loaded
    content = {"format": FORMAT, "about": dict(about), "traces": held, "programs": {**traces.hashes, **programs}}
    text = json.dumps({**content, "digest": _digest(content)}, indent=1)
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def load(path: str | os.PathLike[str], traces: Traces, about: Mapping[str, str], reads: Reads) -> None:
    """Take in what `save` wrote. Raises PlanError where the file is damaged, or was made for another mesh, plan,
    module or version; OSError where there is none."""
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{name} is no file of saved programs, or is damaged: {error}", help=REBUILD) from None
    kind = content.get("format", "") if isinstance(content, dict) else ""
    if kind != FORMAT:
        raise PlanError(f"{name} holds {str(kind)[:80]!r}, and this version reads {FORMAT!r}", help=REBUILD)
    digest = content.pop("digest", None)
    if not _is_of(content, FORM) or digest != _digest(content):
        raise PlanError(f"{name} is damaged: its content is not what was saved", help=REBUILD)
    _check_made_for(name, content["about"], about)
    traces.loaded.update(content["traces"])
    traces.hashes.update(content["programs"])
    traces.reads = reads


def about(module: nn.Module, mesh: Mesh, plan: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """What a file is made for: all that decides over a program beside the calls."""
    return {
        "mesh": ", ".join(f"{name}={mesh[name]}" for name in mesh.names),
        "version of shardc": version("shardc"),
        "version of torch": torch.__version__,
        **{key: str(value) for key, value in options.items()},
        **fingerprint(module),
        "plan": str(plan),
    }


def found_by(about: Mapping[str, str]) -> dict[str, str]:
    """What of that a user chooses; the rest goes out of date."""
    return {key: x for key, x in about.items() if not key.startswith(("version ", "module", "source "))}


def _check_made_for(name: str, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    for key in [*here, *saved]:
        was, now = saved.get(key, ""), here.get(key, "")
        if was == now:
            continue
        if key == "mesh":
            raise PlanError(f"{name} holds programs for a mesh of {was}, and this one is {now}", help=REBUILD)
        if key == "plan":
            lines = zip_longest(was.splitlines(), now.splitlines(), fillvalue="")
            one, other = next((a.strip(), b.strip()) for a, b in lines if a != b)
            raise PlanError(f"{name} was saved under another plan: {one!r} against {other!r}", help=REBUILD)
        changed = f"was {was} and is {now}" if key in found_by(here) or "version" in key else "is another"
        raise PlanError(f"{name} was saved for something else: {key} {changed}", help=REBUILD)


def _is_of(content: Any, form: Any) -> bool:
    """Whether what JSON gave has a form: a type, a list of one, a dict of any names ("") or of these."""
    if isinstance(form, list):
        return isinstance(content, list) and all(_is_of(item, form[0]) for item in content)
    if not isinstance(form, dict):
        return isinstance(content, form)
    named = isinstance(content, dict) and ("" in form or content.keys() == form.keys())
    return named and all(_is_of(item, form.get(key, form.get(""))) for key, item in content.items())


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _data(traced: Traced) -> dict[str, Any]:
    if traced.signature.effects:
        raise ShardingError(
            f"the program sets {', '.join(effect.name for effect in traced.signature.effects)}, which no text says how",
            help="compile where the program runs, instead of loading it",
        )
    constants = {entry.node: entry.value for entry in traced.signature.inputs if entry.value is not None}
    text = full_text(traced, Mesh(), "TRACED")
    return {"text": text.split("\n"), "tensors": {name: _bytes(x) for name, x in constants.items()}}


def _traced(text: list[str], tensors: Mapping[str, str]) -> Traced:
    made = read("\n".join(text), "a saved program").traced
    values = {node.name: val(node) for node in placeholders(made.gm)}
    try:
        inputs = [
            replace(i, value=_tensor(values[i.node], tensors[i.node])) if i.kind is InputKind.CONSTANT else i
            for i in made.signature.inputs
        ]
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise PlanError(f"a saved program lacks the value of a constant: {error}", help=REBUILD) from None
    return Traced(made.gm, replace(made.signature, inputs=tuple(inputs)))


def _bytes(x: Tensor) -> str:
    flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return base64.b64encode(flat.numpy().tobytes()).decode()


def _tensor(like: Any, encoded: str) -> Tensor:
    """A tensor of these bytes, of the shape, dtype and device of a fake one, and dense in memory as that is."""
    content = bytearray(base64.b64decode(encoded, validate=True))
    if not isinstance(like, Tensor) or len(content) != like.numel() * like.element_size():
        raise ValueError("other bytes than its type says")
    x = torch.frombuffer(content, dtype=like.dtype) if content else torch.empty(0, dtype=like.dtype)
    x, last = x.reshape(like.shape), sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    if content and last + 1 == like.numel():
        x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(x)
    return x.to(like.device)
