"""From a call to the program that serves it: one trace per input signature, kept and found again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.fx import GraphModule

from shardc.compiler.analysis.memory import kinds_on
from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.call_keys import call_key, check_call, global_shape, held, shapes_of, text_key
from shardc.compiler.driver.decide import decide
from shardc.compiler.driver.kept_gradients import ALL, Kept, Sync
from shardc.compiler.driver.precision import add_casts, border_casts, call_dtypes, computed_as, info_as
from shardc.compiler.driver.program_cache import Entries, Entry
from shardc.compiler.driver.saved import trace_folder as trace_store
from shardc.compiler.driver.saved.saved_programs import Traces, about, load, save
from shardc.compiler.driver.size_families import Families, Unfit
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.infer.infer import Decisions
from shardc.compiler.infer.marked_layouts import check_counts, input_layouts
from shardc.compiler.infer.open_splits import refinements
from shardc.compiler.ir.carry import add_carries
from shardc.compiler.ir.graph import copy_graph, returned
from shardc.compiler.ir.marks import border_key
from shardc.compiler.ir.node import is_random
from shardc.compiler.ir.owned import read_later
from shardc.compiler.ir.signature import InputKind, OutputKind, Signature, Traced
from shardc.compiler.pipeline.runner import Context, collecting_nothing
from shardc.compiler.plan.layout import Precision
from shardc.compiler.plan.match import find
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.proof.reference import Original
from shardc.compiler.rules.ops.random.distributions import SEED
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec, to_placements
from shardc.compiler.trace.module.reads import Reads, of_all
from shardc.compiler.trace.sizes.symbolic import Template, Values
from shardc.compiler.trace.torch_internals import aside
from shardc.compiler.trace.trace import argument_names, trace
from shardc.compiler.user_code import call_site
from shardc.passes.pipeline import first_passes
from shardc.runtime.run.compiled_stretches import Stretches
from shardc.runtime.run.engines import SimulatedRanks, ThisRank
from shardc.runtime.run.executable import Executable, autocast_state
from shardc.runtime.run.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass
class Lowering:
    """Everything compile was told, and the programs made so far."""

    module: nn.Module
    plan: Resolved
    mesh: Mesh
    ranks: Ranks | None  # None: all ranks simulated here
    values: Callable[[], Mapping[str, Tensor]]  # parameters and buffers, whole
    strict: bool = False
    recompute: tuple[str, ...] = ()
    rng: str = "counter"
    precision: Precision | None = None
    dynamic: bool = False
    backend: str | Callable[..., Any] = "eager"
    without: tuple[str, ...] = ()
    programs: list[Program] = field(default_factory=list)
    kept: Kept = field(default_factory=Kept)
    traces: Traces = field(default_factory=Traces)
    # Told of a parameter that is stored anew, with what moves a local tensor that is laid out as it was.
    followers: list[Callable[[nn.Parameter, Callable[[Tensor], Tensor]], None]] = field(default_factory=list)
    named: dict[str, Program] = field(default_factory=dict)  # by call and sync, to be saved under
    families: Families = field(default_factory=Families)
    _layouts: dict[Any, Any] = field(default_factory=dict)  # of what is passed in, by the form of the call
    _entries: Entries = field(default_factory=Entries)
    _last: Entry | None = None

    def __post_init__(self) -> None:
        self._asked = self.plan
        # Looked at in every call; a module that changes after compile is refused, so they stay what they are.
        self._modules = list(self.module.modules())
        self._params = [(m._parameters, n) for m in self._modules for n, p in m._parameters.items() if p is not None]

    def entry(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync = ALL) -> Entry:
        """The program for a call like this one, lowered now if it is the first such call. Errors name a line: that
        of the call, where there is no better one."""
        try:
            key = (self._call_key(args, kwargs), sync)
            known = self._entries.get(key)
            if known is not None:
                self._entries.use(key)
                return known
            changed = self._entries.changed(key)
            made = self.lower(args, kwargs, sync)
            if changed:
                log.info("program %d, as %s changed", len(self.programs), ", ".join(changed))
            gone = self._entries.add(key, made)
            if gone is not None and not self.families.hold(gone.program):
                self.programs.remove(gone.program)
            return made
        except (PlanError, ShardingError) as error:
            if error.where:
                raise
            raise error.at(call_site()) from error.__cause__

    def serve(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync) -> Entry:
        """The program for a call that is about to run. Where it is not the last call's, the ranks compare theirs:
        pieces of unequal sizes must not meet in one collective. Calls that move nothing are each rank's own."""
        if self.ranks is None:
            return self.entry(args, kwargs, sync)
        key, calls = (self._call_key(args, kwargs), sync), self.ranks.calls
        known = self._entries.get(key)
        if known is not None and not known.moves:
            return known
        if known is not None and known is self._last:
            calls.number += 1
            return known
        with calls.entering():
            entry = known or self.entry(args, kwargs, sync)
            if known is not None:
                self._entries.use(key)
                self.ranks.agree(entry.program.hash, "the program for this call")
        if entry.moves:
            self._last = entry
        else:
            calls.number -= 1
        return entry

    def _call_key(self, args: Sequence[Any], kwargs: Mapping[str, Any], sizes: bool = True) -> tuple:
        return call_key(self._modules, [table[name] for table, name in self._params], args, kwargs, sizes)

    def lower(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync = ALL) -> Entry:
        """Trace, run the pipeline, agree with the other ranks, bind."""
        with collecting_nothing(), aside():
            return self._lowered(args, kwargs, sync)

    def _lowered(self, args: Sequence[Any], kwargs: Mapping[str, Any], sync: Sync) -> Entry:
        check_call(self.module, args, kwargs)
        self.plan.calls.check_call(args, kwargs)
        self.plan.check_count("", "in", len(args))
        form = (self._call_key(args, kwargs, sizes=False), sync)
        program = self._of_family(form, args, kwargs)
        if program is not None:
            if self.ranks is not None:
                self.ranks.agree(program.hash, "the program for this call")
            return Entry(program, self._executable(program))
        call = self._whole_call(args, kwargs, self._layouts_of(args, kwargs))
        template = self._template(form, call)
        values = template and template.solve(shapes_of(call))
        traced = self._traced(call) if template is None or values is None else template.at(values)
        dressed = self._dressed(traced, args, kwargs)
        self._check_results(dressed.signature)
        decisions = Decisions()
        if not self.programs:
            self._settle(dressed, decisions)
        program = self._program(dressed, sync, decisions)
        if template is not None and values is not None:
            self._widen(form, program, template, values, (args, kwargs, sync, decisions))
        key = text_key(self._call_key(args, kwargs), sync)
        self.named[key] = program
        self.traces.check(key, program.hash)
        if self.ranks is not None:
            self.ranks.agree(str(program), "the compiled program")
        self.programs.append(program)
        return Entry(program, self._executable(program))

    def save(self, path: str | os.PathLike[str]) -> None:
        if self.dynamic:
            raise PlanError("programs compiled with dynamic=True cannot be saved", help="leave dynamic out")
        hashes = {key: p.hash for key, p in self.named.items() if p.signature.holds()}
        save(path, self.traces, hashes, self._about())

    def load(self, path: str | os.PathLike[str]) -> None:
        try:
            load(path, self.traces, self._about(), Reads(of_all(self.module)))
        except PlanError as error:
            raise error.at(call_site()) from None

    def _about(self) -> dict[str, str]:
        options = {"strict": self.strict, "recompute": self.recompute, "rng": self.rng, "precision": self.precision}
        options["without"] = self.without
        return about(self.module, self.mesh, self._asked.report(), options)

    def _check_results(self, signature: Signature) -> None:
        """Raises PlanError where forward returns another number of values than there are layouts for."""
        count = signature.out_spec.num_leaves
        result = pytree.tree_unflatten([None] * count, signature.out_spec)
        self.plan.calls.check_result(result)
        if isinstance(result, (tuple, list)):
            self.plan.check_count("", "out", len(result))

    def _settle(self, traced: Traced, decisions: Decisions) -> None:
        """The first program shows which factor a style's open split falls on: store parameters so, rather than
        move them at every step. What torch has no placements for (uneven heads) stays as it is."""
        copy = copy_graph(traced.gm)
        ctx = Context(self.mesh, self.plan, traced.signature, rng=self.rng, decisions=decisions)
        for step in first_passes(ctx):
            step.run(copy, ctx)
        params = dict(self.plan.params)
        for name, spec in refinements(copy, traced.signature, self.plan, self.mesh, decisions).items():
            before, layout = params[name].stored, params[name].computed_as(spec, self.mesh)
            if to_placements(layout.stored, self.mesh) is None:
                continue
            if self.ranks is not None:
                param = self.module.get_parameter(name)
                self.ranks.relay(param, before, layout.stored)
                for follow in self.followers:
                    follow(param, partial(self.ranks.moved, before=before, after=layout.stored))
            params[name] = layout
        self.plan = replace(self.plan, params=params)

    def _executable(self, program: Program) -> Executable:
        parts, signature = program.halves, program.signature
        results = len(signature.indices(OutputKind.OUTPUT, OutputKind.MUTATION))
        changed = {signature.outputs[i].of or 0 for i in signature.indices(OutputKind.MUTATION)}
        later = read_later(parts.forward, results)
        late = [signature.inputs[i].name for i in signature.indices(InputKind.TANGENT, InputKind.CARRY)]
        if self.ranks is None:
            sources = [signature.outputs[i].of or 0 for i in signature.indices(OutputKind.GRADIENT)]
            engine = SimulatedRanks(parts, len(late), self.mesh, results, sources, later & changed)
            return Executable(signature, engine, {}, self.kept, sorted(later - changed))
        stretches = Stretches(self.backend) if self.backend != "eager" else None
        forward = self.ranks.bind(parts.forward, stretches, len(signature.indices(OutputKind.OUTPUT)), changed)
        backward = parts.backward and self.ranks.backward(parts.backward, late, program.hash, stretches)
        if stretches is not None:
            stretches.compile_all(kinds_on(parts, self.mesh, self.ranks.coords))
        wraps, kept = self._gradients(program)
        drawing = [self._drawing(half) for half in (parts.forward, parts.backward)]
        engine = ThisRank(forward, backward, results, wraps, *drawing)
        return Executable(signature, engine, kept, self.kept, sorted(later - changed))

    def _drawing(self, half: GraphModule | None) -> Callable[[], AbstractContextManager[None]]:
        """Around a half in which torch draws whole tensors, all ranks draw alike. (A seed agrees by itself.)"""
        nodes = half.graph.nodes if half is not None else ()
        whole = any(is_random(n) and n.target is not SEED for n in nodes)
        return self.ranks.drawing_alike if whole and self.ranks is not None else nullcontext

    def _gradients(self, program: Program) -> tuple[dict[int, Callable[[Tensor], Tensor]], dict[int, tuple[str, Spec]]]:
        """Which gradients become DTensors (those of parameters held as shards), and which are kept back."""
        assert self.ranks is not None
        wraps, kept, ends = {}, {}, returned(program.gm)
        for i, place in enumerate(program.signature.indices(OutputKind.GRADIENT)):
            source = program.signature.inputs[program.signature.outputs[place].of or 0]
            if source.kind is not InputKind.PARAMETER or ends[place] is None:
                continue
            spec: Spec = ends[place].meta["spec"]
            layout = self.plan.params[source.name]
            if spec.pending and not layout.local:
                kept[i] = source.name, spec
            elif not layout.stored.is_whole:
                wraps[i] = self.ranks.wrapper(layout.stored)
        return wraps, kept

    def _of_family(self, form: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program | None:
        """The program of a family that has these sizes. Its conditions hold: forward takes the path that its own
        call took, so what is passed in lies as it did then."""
        if form not in self.families.made:
            return None
        return self.families.find(form, shapes_of(self._whole_call(args, kwargs, self._layouts.get(form))))

    def _template(self, form: Any, call: tuple[Any, Any]) -> Template | None:
        """The module traced for all sizes, where it is asked for and can be."""
        if not self.dynamic or not self.families.has_room(form):
            return None
        try:
            traced = trace(self.module, *call, symbolic=True, **self._known())
        except ShardingError as error:
            log.warning("dynamic: each size gets a program of its own, as %s", error)
            return None
        return Template.of(traced.gm, traced.signature)

    def _widen(self, form: Any, program: Program, template: Template, values: Values, call: tuple) -> None:
        """Let the program serve other sizes too, if it is the same there."""
        *given, sync, decisions = call

        def lower(values: Values) -> Program:
            return self._program(self._dressed(template.at(values), *given), sync, Decisions(decisions))

        try:
            family = self.families.add(form, program, template, values, lower)
            log.info("dynamic: %s", family.note())
        except Unfit as error:
            log.warning("dynamic: this program is for its own sizes only: %s", error)
        if self.ranks is not None and self.plan.declares_inside:
            self._layouts[form] = self._layouts_of(*given)

    def _program(self, traced: Traced, sync: Sync, decisions: Decisions) -> Program:
        """What the pipeline makes of a traced module (its graph is consumed)."""
        if sync.carries:
            traced = add_carries(traced, [name for name, _ in sync.carries])
        ctx = Context(
            self.mesh, self.plan, traced.signature, keep=frozenset(sync.keep), carries=dict(sync.carries),
            strict=self.strict, rng=self.rng, without=self.without, decisions=decisions,
        )  # fmt: skip
        training = tuple(m.training for m in self._modules)
        original = Original(
            self.module, traced.signature, self.values, training, autocast_state(), self.rng, self.precision,
            border_casts(self.module, self.precision),
        )  # fmt: skip
        return decide(traced, ctx, original)

    def _whole_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], layouts: Any) -> tuple[Any, Any]:
        """The call at global shapes and in the dtypes computed with. On real ranks the caller passes pieces: sizes
        are multiplied by the mesh dims that split them, for which the names (and styles on the root's border) must
        be known."""
        call = self._computed(args, kwargs)
        return call if self.ranks is None else self._global_call(*call, layouts)

    def _computed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return pytree.tree_map(lambda x: computed_as(x, self.precision), (tuple(args), dict(kwargs)))

    def _layouts_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[dict[str, Any] | None] | None:
        """Per leaf of the arguments, the layout it is passed in, where only the graph shows it."""
        if self.ranks is None or not self.plan.declares_inside:
            return None
        traced = self._traced(self._computed(args, kwargs), grad=True)
        found = input_layouts(traced.gm, traced.signature, self.plan)
        return [None if leaf.input is None else found[leaf.input] for leaf in traced.signature.leaves]

    def _known(self, grad: bool | None = None) -> dict[str, Any]:
        """What tracing is told beside the call."""
        infos = {fqn: info_as(x, self.precision) for fqn, x in held(self.module).items()}
        grad = torch.is_grad_enabled() if grad is None else grad
        casts = border_casts(self.module, self.precision)
        return {"marks": self.plan.marked, "params": infos, "grad": grad, "casts": casts}

    def _traced(self, call: tuple[Any, Any], grad: bool | None = None) -> Traced:
        """From what is kept, or made now."""
        known = self._known(grad)
        key = text_key(self._call_key(*call), known["marks"], sorted(known["params"].items()), known["grad"])
        found = self.traces.find(key)
        if found is None and trace_store.on():
            found = trace_store.find(key, self._about(), Reads(of_all(self.module)))
            if found is not None:
                self.traces.keep(key, found)
        if found is None:
            found = trace(self.module, *call, **known)
            self.traces.keep(key, found)
            if trace_store.on():
                trace_store.keep(key, found, self._about())
        return found

    def _dressed(self, traced: Traced, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
        """With the casts of the precision, and what is to be recomputed marked."""
        if self.precision is not None:
            dtypes = {fqn: x.dtype for fqn, x in held(self.module).items()}
            given = call_dtypes(traced, tuple(args), dict(kwargs))
            traced = add_casts(traced, dtypes | given, self.precision)
        check_counts(traced.gm, self.plan)
        for node in traced.gm.graph.nodes:
            if node.op == "call_function" and node.meta.get("phase") == "forward":
                node.meta["region"] = node.meta.get("region") or self._recomputed_as(node.meta.get("path", ""))
        return traced

    def _recomputed_as(self, path: str) -> str:
        """The outermost module around a path that the user asked to recompute, if any: a region of its own."""
        parts = path.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        found = (prefix for prefix in ["", *prefixes] if any(find(pattern, [prefix]) for pattern in self.recompute))
        return next(("the root" if prefix == "" else prefix for prefix in found), "")

    def _check_label(self, x: Tensor, name: str, layout: Mapping[str, Any]) -> None:
        """A DTensor says itself how it lies; that must be what the program was told."""
        if not isinstance(x, DTensor):
            return
        told = tuple(layout.get(axis, Replicate()) for axis in self.mesh.names)
        if Mesh.of(x.device_mesh) != self.mesh or tuple(x.placements) != told:
            raise PlanError(
                f"input {name} is a DTensor laid out {tuple(x.placements)}, and the program expects {told}",
                help=f"say so: compile(..., inputs={{{name!r}: Layout(...)}}), or redistribute it before the call",
            )

    def _global_call(self, args: Any, kwargs: Any, layouts: Sequence[Any] | None) -> tuple[tuple, dict]:
        """The arguments with meta tensors of global shape in place of pieces."""
        names = argument_names(self.module, args, kwargs)
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        for i, (x, (name, head)) in enumerate(zip(leaves, names, strict=True)):
            if not isinstance(x, Tensor):
                continue
            entering = [border_key("", "in", head)]
            layout = layouts[i] if layouts is not None else self.plan.root_layout("in", name, x.dim(), entering)
            self._check_label(x, name, layout or {})
            shape = global_shape(x, layout or {}, self.mesh)
            if shape != tuple(x.shape):
                leaves[i] = torch.empty(shape, dtype=x.dtype, device="meta").requires_grad_(x.requires_grad)
        return pytree.tree_unflatten(leaves, structure)
