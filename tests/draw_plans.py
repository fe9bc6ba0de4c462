"""Random plans and meshes for a drawn program, each written as the Python that says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from shardc import Mesh
from tests.draws import WORDS, Child, Drawn

MESHES = {
    "Mesh(tp=2)": ("tp",), "Mesh(tp=3)": ("tp",), "Mesh(tp=4)": ("tp",), "Mesh(dp=2, tp=2)": ("dp", "tp"),
    "Mesh(tp=2, dp=2)": ("tp", "dp"), "Mesh(dp=3, tp=2)": ("dp", "tp"), "Mesh(tp=5)": ("tp",),
    "Mesh(dp=2, cp=2, tp=2)": ("dp", "cp", "tp"),
}  # fmt: skip
OFTEN = list(MESHES)[:4]


@dataclass(frozen=True)
class Asked:
    """What compile is told, as source text."""

    mesh: str
    plan: str
    options: tuple[tuple[str, str], ...]

    def values(self) -> tuple[Mesh, Any, dict[str, Any]]:
        options = {name: eval(code, WORDS) for name, code in self.options}
        return eval(self.mesh, WORDS), eval(self.plan, WORDS), options

    def __repr__(self) -> str:
        options = "".join(f", {name}={code}" for name, code in self.options)
        return f"compile(model, {self.plan}, mesh={self.mesh}{options})"


def ask(random: Random, drawn: Drawn) -> Asked:
    """A mesh, a plan that makes sense for a program on it, and now and then an option."""
    d = _Plans(random)
    mesh = d.one(*OFTEN, *OFTEN, *MESHES)
    names = MESHES[mesh]
    entries = ", ".join(f"{axis}={d.entry(drawn)}" for axis in names)
    options = []
    for side, ndims in (("inputs", [len(s) for _, s in drawn.inputs]), ("outputs", list(drawn.outputs))):
        if d.one(True, False):
            options.append((side, d.layouts(ndims, names, side)))
    if drawn.children and d.one(False, False, False, False, True):
        options.append(("recompute", repr([d.one(*drawn.children).name])))
    return Asked(mesh, f"Plan({entries})", tuple(options))


class _Plans:
    """Draws the parts of a plan."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def placement(self, ndim: int) -> str:
        if ndim == 0 or self.one(False, False, True):
            return "Replicate()"
        return f"Shard({self.random.randint(-ndim, ndim - 1)})"

    def layouts(self, ndims: Sequence[int], names: Sequence[str], side: str) -> str:
        """One layout for each input, or output; several outputs are a tuple, one is itself."""
        found = []
        for ndim in ndims:
            parts = ", ".join(f"{axis}={self.placement(ndim)}" for axis in names)
            found.append(self.one(f"Layout({parts})", f"Layout({parts})", f"Layout({parts})", "None"))
        if side == "outputs" and len(ndims) == 1:
            return found[0]
        return f"({', '.join(found)},)"

    def entry(self, drawn: Drawn) -> str:
        """What one mesh dim does."""
        kind = self.one("keys", "keys", "keys", "keys", "Replicated", "FullyShard")
        if kind == "Replicated":
            modules = [c.name for c in drawn.children if c.kind != "weight"]
            ignoring = f'Replicated(ignored_modules="{self.one(*modules)}")' if modules else "Replicated()"
            return self.one("Replicated()", ignoring)
        if kind == "FullyShard":
            modules = [f'"{c.name}"' for c in drawn.children if c.kind != "weight"]
            units = self.random.sample(modules, self.random.randint(0, min(2, len(modules))))
            return f"FullyShard({', '.join([*units, *self.one([], [], ['reshard_after_forward=False'])])})"
        keys: dict[str, str] = {}
        for child in drawn.children:
            keys |= self.wishes(child)
        return "{" + ", ".join(f'"{k}": {v}' for k, v in keys.items()) + "}"

    def wishes(self, child: Child) -> Mapping[str, str]:
        """What a plan says of one child: nothing, a style, or placements of its parameters."""
        if child.kind == "weight":
            return {child.name: self.placement(child.ndim)}
        styled = ["style"] * 4 if child.kind in ("linear", "emb", "conv", "mha") else []
        way = self.one(*styled, "placed", "placed", "borders", "none")
        if way == "none":
            return {}
        if way == "borders":
            return {child.name: self.borders(child)}
        if way == "placed":
            held = eval(child.code, WORDS).named_parameters()
            return {f"{child.name}.{name}": self.placement(p.dim()) for name, p in held if self.one(True, False)}
        options = []
        if self.one(False, False, True):
            options.append(f"input_layouts={self.placement(child.ndim)}")
        if self.one(False, False, True):
            options.append(f"output_layouts={self.placement(child.ndim + (child.kind == 'emb'))}")
        style = "ColwiseParallel" if child.kind == "mha" else self.one("ColwiseParallel", "RowwiseParallel")
        return {child.name: f"{style}({', '.join(options)})"}

    def borders(self, child: Child) -> str:
        """A style that speaks of what enters and leaves a module only."""
        out = child.ndim + (child.kind == "emb")
        takes = f"input_layouts={self.placement(child.ndim)}, desired_input_layouts={self.placement(child.ndim)}"
        gives = f"output_layouts={self.placement(out)}, desired_output_layouts={self.placement(out)}"
        ways = [
            f"PrepareModuleInput({takes})",
            f"PrepareModuleOutput({gives})",
            f"PrepareModuleInputOutput({takes}, {gives})",
        ]
        if child.kind == "norm" and child.ndim > 1:
            ways += [f"SequenceParallel(sequence_dim={self.random.randint(0, child.ndim - 1)})"] * 2
        return self.one(*ways)
