"""From a call to the program that serves it: found, or else traced, decided and bound, and kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.bind import bind
from shardc.compiler.driver.calls.call_keys import Keys, text_key
from shardc.compiler.driver.calls.passing import Taken
from shardc.compiler.driver.calls.program_cache import Entries, Entry
from shardc.compiler.driver.calls.retraces import Retraces
from shardc.compiler.driver.calls.same_values import constants
from shardc.compiler.driver.decide import Deciding, Options
from shardc.compiler.driver.kept_gradients import ALL, Kept, Sync
from shardc.compiler.driver.size_families import Families
from shardc.compiler.driver.tracing import Tracing
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.pipeline.runner import collecting_nothing
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec
from shardc.compiler.trace.torch_internals import aside
from shardc.compiler.user_code import call_site
from shardc.runtime.run.executable import autocast_state
from shardc.runtime.run.ranks import Ranks

# Of a module and a call: the plan to run by, and patterns of what is to be recomputed.
Planned = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], tuple[Resolved, tuple[str, ...]]]


class Lowering:
    """One module's programs. ranks: None where all are simulated here. kept: gradients of unsynchronised steps.
    planned: asked at the first call for the plan, where none was given.

    followers: told of a parameter that is stored anew, with what moves a local tensor that is laid out as it was.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Resolved,
        mesh: Mesh,
        ranks: Ranks | None,
        options: Options,
        planned: Planned | None = None,
    ) -> None:
        self.mesh, self.ranks, self.options = mesh, ranks, options
        self.keys = Keys(module)
        self.tracing = Tracing(module, plan, mesh, options, self.keys, ranks is not None)
        self.deciding = Deciding(module, plan, mesh, options, self._moved)
        self.families = Families(self.tracing, self.deciding)
        self.kept = Kept()
        self.programs: list[Program] = []
        self.followers: list[Callable[[nn.Parameter, Callable[[Tensor], Tensor]], None]] = []
        self._module, self._planned = module, planned
        self._named: dict[str, Program] = {}  # by call and sync, to be saved under
        self._entries = Entries()
        self._retraces = Retraces(module)
        self._last: Entry | None = None  # that moved something

    @property
    def plan(self) -> Resolved:
        return self.deciding.plan

    def serve(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync) -> Entry:
        """The program for a call that is about to run. Where it is not the last call's, the ranks compare theirs:
        pieces of unequal sizes must not meet in one collective. Calls that move nothing are each rank's own."""
        if self.ranks is None:
            return self.entry(args, kwargs, sync)
        calls, known = self.ranks.calls, self._entries.get((self.keys.of(args, kwargs), sync))
        if known is not None and not known.moves:
            return known
        if known is not None and known is self._last:
            calls.number += 1
            return known
        with calls.entering():
            entry = known or self.entry(args, kwargs, sync)
            if known is not None:
                self._agree(entry.program.hash, "the program for this call", sync)
        if entry.moves:
            self._last = entry
        else:
            calls.number -= 1
        return entry

    def entry(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync = ALL) -> Entry:
        """The program for a call like this one, lowered now if it is the first such call. Errors name a line: that
        of the call, where there is no better one."""
        with _NamingTheCall():
            key = (self.keys.of(args, kwargs), sync)
            known = self._entries.get(key)
            if known is not None:
                return known
            reasons = {name: "changed" for name in self._entries.changed(key)}
            reasons = reasons or self._retraces.reasons(key, self._entries.keys(), args, kwargs)
            begin, programs = time.perf_counter(), len(self.programs)
            made = self.lower(args, kwargs, sync)
            if len(self.programs) > programs:
                self._retraces.said(len(self.programs), time.perf_counter() - begin, reasons)
            gone = self._entries.add(key, made)
            if gone is not None and not self.families.hold(gone.program):
                self.programs.remove(gone.program)
            return made

    def lower(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync = ALL) -> Entry:
        """A program made now, unless one for many sizes has these."""
        with collecting_nothing(), aside():
            self.tracing.check(args, kwargs)
            if self._planned is not None:
                plan, recompute = self._planned(self._module, args, kwargs)
                self._planned, self.tracing.plan, self.deciding.plan = None, plan, plan
                self.options = self.tracing.options = replace(self.options, recompute=recompute)
            form = (self.keys.of(args, kwargs, sizes=False), sync)
            program = self.families.find(form, args, kwargs)
            if program is None:
                program = self._made(form, args, kwargs, sync)
            elif self.ranks is not None:
                self._agree(program.hash, "the program for this call", sync)
            return Entry(program, bind(program, self.ranks, self.options.backend, self.kept))

    def save(self, path: str | os.PathLike[str]) -> None:
        if self.options.dynamic:
            raise PlanError("programs compiled with dynamic=True cannot be saved", help="leave dynamic out")
        self.tracing.save(path, {key: p.hash for key, p in self._named.items() if p.signature.holds()})

    def load(self, path: str | os.PathLike[str]) -> None:
        with _NamingTheCall():
            self.tracing.load(path)

    def _made(self, form: Any, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync) -> Program:
        """Traced, decided, and the same on every rank."""

        def decided(taken: Taken | None) -> Program:
            program = self.families.program(form, args, kwargs, sync, taken) if self.options.dynamic else None
            return program or self.deciding.program(self.tracing.traced(args, kwargs, taken), sync)

        program = self.tracing.tried(args, kwargs, decided)
        key = text_key(self.keys.of(args, kwargs), sync)
        self._named[key] = program
        self.tracing.traces.check(key, program.hash)
        if self.ranks is not None:
            self._agree(f"{program}\n{constants(program.signature)}", "the compiled program", sync)
        self.programs.append(program)
        return program

    def _modes(self, sync: Sync) -> str:
        """What beside inputs decides which program a call needs, a line each."""
        modules = dict(self._module.named_modules())
        odd = [name or "the model" for name, m in modules.items() if not m.training]
        which = "all" if len(odd) == len(modules) else ", ".join(odd) or "none"
        frozen = [name for name, p in self._module.named_parameters() if not p.requires_grad]
        casts = ", ".join(f"{kind} to {dtype}" for kind, dtype in autocast_state())
        lines = [
            f"in eval mode: {which}",
            f"gradients: {'on' if torch.is_grad_enabled() else 'off (no_grad)'}",
            f"autocast: {casts or 'off'}",
            f"parameters that require no grad: {', '.join(frozen) or 'none'}",
            f"not reduced (no_sync): {', '.join(sync.keep) or 'none'}",
            f"kept back from unsynchronised steps: {', '.join(name for name, _ in sync.carries) or 'none'}",
        ]
        return "\n".join(lines)

    def _agree(self, text: str, what: str, sync: Sync) -> None:
        if self.ranks is not None:
            self.ranks.agree(f"{self._modes(sync)}\n{text}", what)

    def _moved(self, name: str, before: Spec, after: Spec) -> None:
        """Store a parameter in another layout, and what follows it."""
        if self.ranks is None:
            return
        param = self._module.get_parameter(name)
        self.ranks.relay(param, before, after)
        for follow in self.followers:
            follow(param, partial(self.ranks.moved, before=before, after=after))


class _NamingTheCall:
    """Errors within, where they have no better line, get that of the call."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        if isinstance(error, (PlanError, ShardingError)) and not error.where:
            raise error.at(call_site()) from error.__cause__
