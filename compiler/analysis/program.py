"""A compiled program as its user holds it: its text and parts, why it is so, and the proof against one device."""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import Any

from shardc.compiler.analysis.dump import dump
from shardc.compiler.analysis.explain import explain
from shardc.compiler.analysis.lowered import Lowered
from shardc.compiler.analysis.memory import peak_bytes
from shardc.compiler.analysis.optimality import Choices, Optimality
from shardc.compiler.analysis.work import Work, work
from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.text import input_names
from shardc.compiler.proof.prove import prove


class Program(Lowered):
    """One traced signature of a module, laid out over a mesh; `print` shows every value with its layout."""

    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment of forward and backward on the rank that holds most."""
        return peak_bytes(self.halves, self.mesh)

    def work(self) -> Work:
        """What each operator does on all ranks beyond what one device would: FLOPs, share, module and line."""
        return work(self.global_gm, self.mesh)

    def optimality(self) -> Optimality:
        """Estimated seconds of a step on the compiled-for hardware (`compile(hardware=)`), what no layouts that the
        plan allows can do it in, and the gap between, of the first. docs/deciding.md says what is counted."""
        return self._choices.optimality

    @cached_property
    def _choices(self) -> Choices:
        if self.chosen is None:
            raise ShardingError("this program has no layouts to choose from", help="compile it with a plan")
        return Choices(self.chosen, self.mesh, self.plan.data_axes, self.hardware)

    def explain(self, value: str) -> str:
        """Why a value has its layout: the chain of plan entries and rules, what the choice costs and what the next
        best would. value: its name in the text."""
        name = value.removeprefix("%")
        chain = explain(self.gm, self.global_gm, name, input_names(self.signature))
        return "\n".join([chain, *(self._choices.lines(name) if self.chosen is not None else ())])

    def data(self) -> dict[str, Any]:
        """Everything the viewer shows, as plain data; docs/viewer.md describes it."""
        return dump(self, input_names(self.signature))

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write `data()` as JSON, to be looked at elsewhere: `shardc view program.json`."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.data(), file, separators=(",", ":"))

    def view(
        self, path: str | os.PathLike[str], *, compare: Program | None = None, title: str = "", links: str = "h100"
    ) -> None:
        """Write the viewer's page: one HTML file that opens offline. compare: another program to set beside this
        one. links: the machine that the timeline is estimated for, as in `shardc view --links`."""
        from shardc.tools.page import page  # the one edge into tools; it gets data only

        programs = [self.data()] if compare is None else [self.data(), compare.data()]
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(*programs, titles=(title,) if title else (), links=links))

    def verify(self, *inputs: Any, **kwargs: Any) -> Any:
        """Simulate all ranks on these global inputs and compare with the original module: outputs, every
        gradient, and every value in between. Raises ShardingError naming the first value that differs and
        its line; returns the largest relative difference."""
        return prove(self, inputs, kwargs)
