"""From a call to the program that serves it: one trace per input signature, kept and found again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.fx import GraphModule

from shardc.compiler.borders import border_layout, check_counts, input_layouts, needs_trace
from shardc.compiler.calls import call_key, check_call, global_shape, held, text_key
from shardc.compiler.carry import add_carries
from shardc.compiler.collectives import COLLECTIVES
from shardc.compiler.draws import SEED
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.graph import copy_graph, is_random, move_of, placeholders, returned
from shardc.compiler.layout import Precision
from shardc.compiler.match import find
from shardc.compiler.mesh import Mesh
from shardc.compiler.mixed import add_casts, call_dtypes, computed_as, info_as
from shardc.compiler.original import Original
from shardc.compiler.pipeline import Context
from shardc.compiler.plan import call_site
from shardc.compiler.program import Program
from shardc.compiler.refine import refinements
from shardc.compiler.resolved import Resolved
from shardc.compiler.saved import Traces, about, load, save
from shardc.compiler.signature import InputKind, OutputKind, Signature, TensorInfo
from shardc.compiler.spec import Spec, to_placements
from shardc.compiler.trace import Traced, argument_names, trace
from shardc.passes.pipeline import first_passes
from shardc.runtime.engines import SimulatedRanks, ThisRank
from shardc.runtime.executable import Executable, autocast_state
from shardc.runtime.ranks import Ranks


@dataclass
class Entry:
    """A program and the function that runs it."""

    program: Program
    run: Executable

    def __post_init__(self) -> None:
        moves = (move_of(node) for node in self.program.gm.graph.nodes)
        self.moves = any(move is not None and move.target in COLLECTIVES for move in moves)


class Kept:
    """Gradients left pending at unsynchronised steps, by parameter, with their layouts."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._specs: dict[str, Spec] = {}
        self._due: dict[str, None] = {}  # whose unsynchronised forward has run, and perhaps not its backward

    def declare(self, name: str, spec: Spec) -> None:
        """In which layout the program at hand leaves a parameter's gradient."""
        self._specs[name] = spec

    def expect(self, names: Iterable[str]) -> None:
        self._due |= dict.fromkeys(names)

    def keep(self, name: str, gradient: Tensor) -> None:
        self._tensors[name] = self._tensors[name] + gradient if name in self._tensors else gradient

    def take(self, name: str) -> Tensor | None:
        self._due.pop(name, None)
        return self._tensors.pop(name, None)

    def clear(self) -> None:
        """Forget what was kept, as `zero_grad` does to what is in `.grad`."""
        self._tensors.clear()
        self._due.clear()

    def layouts(self) -> tuple[tuple[str, Spec], ...]:
        """Those that the next synchronised backward must take in, in the order in which programs declared them."""
        return tuple((name, spec) for name, spec in self._specs.items() if name in self._tensors or name in self._due)


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
    programs: list[Program] = field(default_factory=list)
    kept: Kept = field(default_factory=Kept)
    traces: Traces = field(default_factory=Traces)
    # Told of a parameter that is stored anew, with what moves a local tensor that is laid out as it was.
    followers: list[Callable[[nn.Parameter, Callable[[Tensor], Tensor]], None]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)  # of the programs, by call and variant
    _entries: dict[Any, Entry] = field(default_factory=dict)
    _last: Entry | None = None

    def __post_init__(self) -> None:
        self._asked = self.plan
        # Looked at in every call; a module that changes after compile is refused, so they stay what they are.
        self._modules = list(self.module.modules())
        self._params = [(m._parameters, n) for m in self._modules for n, p in m._parameters.items() if p is not None]

    def entry(self, args: Sequence[Any], kwargs: Mapping[str, Any], variant: Any = "reduce") -> Entry:
        """The program for a call like this one, lowered now if it is the first such call. Errors name a line: that
        of the call, where there is no better one."""
        try:
            key = (self._call_key(args, kwargs), variant)
            if key not in self._entries:
                self._entries[key] = self.lower(args, kwargs, variant)
            return self._entries[key]
        except (PlanError, ShardingError) as error:
            if error.where:
                raise
            raise error.at(call_site()) from error.__cause__

    def serve(self, args: Sequence[Any], kwargs: Mapping[str, Any], variant: Any) -> Entry:
        """The program for a call that is about to run. Where it is not the last call's, the ranks compare theirs:
        pieces of unequal sizes must not meet in one collective. Calls that move nothing are each rank's own."""
        if self.ranks is None:
            return self.entry(args, kwargs, variant)
        known, calls = self._entries.get((self._call_key(args, kwargs), variant)), self.ranks.calls
        if known is not None and not known.moves:
            return known
        if known is not None and known is self._last:
            calls.number += 1
            return known
        with calls.entering():
            entry = known or self.entry(args, kwargs, variant)
            if known is not None:
                self.ranks.agree(entry.program.hash, "the program for this call")
        if entry.moves:
            self._last = entry
        else:
            calls.number -= 1
        return entry

    def _call_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple:
        return call_key(self._modules, [table[name] for table, name in self._params], args, kwargs)

    def lower(self, args: Sequence[Any], kwargs: Mapping[str, Any], variant: Any = "reduce") -> Entry:
        """Trace, run the pipeline, agree with the other ranks, bind. variant: "reduce", "keep" (gradients are
        left unreduced over data-parallel mesh dims), or the layouts of kept gradients to take in."""
        check_call(self.module, args, kwargs)
        self.plan.roots.check_call(args, kwargs)
        self.plan.check_count("", "in", len(args))
        traced = self._trace(args, kwargs)
        self._check_results(traced.signature)
        if not self.programs:
            self._settle(traced)
        carries = variant if isinstance(variant, tuple) else ()
        if carries:
            traced = add_carries(traced, [name for name, _ in carries])
        ctx = Context(
            self.mesh, self.plan, traced.signature, average=self.ranks is not None, reduce=variant != "keep",
            carries=dict(carries), strict=self.strict, rng=self.rng,
        )  # fmt: skip
        training = tuple(m.training for m in self._modules)
        original = Original(
            self.module, traced.signature, self.values, training, autocast_state(), self.rng, self.precision
        )
        program = Program.build(traced, ctx, original)
        key = text_key(self._call_key(args, kwargs), variant)
        self.hashes[key] = program.hash
        self.traces.check(key, program.hash)
        if self.ranks is not None:
            self.ranks.agree(str(program), "the compiled program")
        self.programs.append(program)
        return Entry(program, self._executable(program))

    def save(self, path: str | os.PathLike[str]) -> None:
        save(path, self.traces, self.hashes, self._about())

    def load(self, path: str | os.PathLike[str]) -> None:
        try:
            load(path, self.traces, self._about())
        except PlanError as error:
            raise error.at(call_site()) from None

    def _about(self) -> dict[str, Any]:
        options = {"strict": self.strict, "recompute": self.recompute, "rng": self.rng, "precision": self.precision}
        return about(self.module, self.mesh, self._asked.report(), options)

    def _check_results(self, signature: Signature) -> None:
        """Raises PlanError where forward returns another number of values than there are layouts for."""
        count = signature.out_spec.num_leaves
        result = pytree.tree_unflatten([None] * count, signature.out_spec)
        self.plan.roots.check_result(result)
        if isinstance(result, (tuple, list)):
            self.plan.check_count("", "out", len(result))

    def _settle(self, traced: Traced) -> None:
        """The first program shows which factor a style's open split falls on: store parameters so, rather than
        move them at every step. What torch has no placements for (uneven heads) stays as it is."""
        copy = copy_graph(traced.gm)
        ctx = Context(self.mesh, self.plan, traced.signature, rng=self.rng)
        for step in first_passes(ctx):
            step.run(copy, ctx)
        params = dict(self.plan.params)
        for name, spec in refinements(copy, traced.signature, self.plan, self.mesh).items():
            layout, placements = params[name], to_placements(spec, self.mesh)
            if placements is None or layout.stored != layout.compute:
                continue
            stored = {a: p for a, p in zip(self.mesh.names, placements, strict=True) if not isinstance(p, Replicate)}
            if self.ranks is not None:
                param, before = self.module.get_parameter(name), layout.stored_spec(self.mesh)
                self.ranks.relay(param, before, spec)
                for follow in self.followers:
                    follow(param, partial(self.ranks.moved, before=before, after=spec))
            params[name] = replace(layout, stored=stored, compute=stored)
        self.plan = replace(self.plan, params=params)

    def _executable(self, program: Program) -> Executable:
        parts, signature = program.halves, program.signature
        results = len(signature.indices(OutputKind.OUTPUT, OutputKind.MUTATION))
        if self.ranks is None:
            engine = SimulatedRanks(parts.forward, parts.backward, self.mesh, results)
            return Executable(signature, engine, {}, self.kept)
        forward = self.ranks.bind(parts.forward)
        backward = self.ranks.bind(parts.backward) if parts.backward is not None else None
        wraps, kept = self._gradients(program)
        blank = [self.ranks.zeros(n) for n in placeholders(program.gm) if n.name in _carries(signature)]
        drawing = [self._drawing(half) for half in (parts.forward, parts.backward)]
        engine = ThisRank(forward, backward, results, wraps, blank, *drawing)
        return Executable(signature, engine, kept, self.kept)

    def _drawing(self, half: GraphModule | None) -> Callable[[], AbstractContextManager[None]]:
        """Around a half in which torch draws whole tensors, all ranks draw alike. (A seed agrees by itself.)"""
        nodes = half.graph.nodes if half is not None else ()
        whole = any(is_random(n) and n.target is not SEED for n in nodes)
        return self.ranks.drawing_alike if whole and self.ranks is not None else nullcontext

    def _gradients(self, program: Program) -> tuple[dict[int, Callable[[Tensor], Tensor]], dict[int, str]]:
        """Which gradients become DTensors (those of parameters held as shards), and which are kept back."""
        assert self.ranks is not None
        wraps, kept, ends = {}, {}, returned(program.gm)
        for i, place in enumerate(program.signature.indices(OutputKind.GRADIENT)):
            source = program.signature.inputs[program.signature.outputs[place].of or 0]
            if source.kind is not InputKind.PARAMETER or ends[place] is None:
                continue
            spec: Spec = ends[place].meta["spec"]
            ignored = any(source.name in names for names in self.plan.ignored.values())
            if spec.pending and not ignored:
                kept[i] = source.name
                self.kept.declare(source.name, spec)
            elif self.plan.params[source.name].stored:
                wraps[i] = self.ranks.wrapper(self._stored(source.name))
        return wraps, kept

    def _stored(self, name: str) -> Spec:
        return self.plan.params[name].stored_spec(self.mesh)

    def _trace(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
        """The traced module at global shapes. On real ranks the caller passes pieces: sizes are multiplied by
        the mesh dims that split them, for which the names (and styles on the root's border) must be known."""
        grad = torch.is_grad_enabled()
        tensors = held(self.module)
        infos = {fqn: info_as(x, self.precision) for fqn, x in tensors.items()}
        given: tuple[Any, Any] = (tuple(args), dict(kwargs))
        call: tuple[Any, Any] = pytree.tree_map(lambda x: computed_as(x, self.precision), given)
        layouts = None
        if self.ranks is not None:
            if needs_trace(self.plan):
                layouts = self._traced_layouts(self._traced(call, infos, True))
            call = self._global_call(*call, layouts)
        traced = self._traced(call, infos, grad)
        if self.precision is not None:
            dtypes = {fqn: x.dtype for fqn, x in tensors.items()}
            traced = add_casts(traced, dtypes | call_dtypes(traced, *given), self.precision)
        check_counts(traced.gm, self.plan)
        for node in traced.gm.graph.nodes:
            if node.op == "call_function" and node.meta.get("phase") == "forward":
                node.meta["recompute"] = node.meta.get("recompute") or self._recomputed_as(node.meta.get("path", ""))
        return traced

    def _traced(self, call: tuple[Any, Any], infos: Mapping[str, TensorInfo], grad: bool) -> Traced:
        """From what is kept, or made now."""
        key = text_key(self._call_key(*call), self.plan.marked, sorted(infos.items()), grad)
        found = self.traces.find(key)
        if found is None:
            found = trace(self.module, *call, marks=self.plan.marked, params=infos, grad=grad)
            self.traces.keep(key, found)
        return found

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

    def _traced_layouts(self, traced: Traced) -> list[dict[str, Any] | None]:
        """Per leaf of the arguments, the layout it is passed in, as the graph shows it."""
        found = input_layouts(traced.gm, traced.signature, self.plan)
        return [None if leaf.input is None else found[leaf.input] for leaf in traced.signature.leaves]

    def _global_call(self, args: Any, kwargs: Any, layouts: Sequence[Any] | None) -> tuple[tuple, dict]:
        """The arguments with meta tensors of global shape in place of pieces."""
        names = argument_names(self.module, args, kwargs)
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        for i, (x, (name, head)) in enumerate(zip(leaves, names, strict=True)):
            if not isinstance(x, Tensor):
                continue
            layout = layouts[i] if layouts is not None else border_layout(name, head, x.dim(), self.plan)
            self._check_label(x, name, layout or {})
            shape = global_shape(x, layout or {}, self.mesh)
            if shape != tuple(x.shape):
                leaves[i] = torch.empty(shape, dtype=x.dtype, device="meta").requires_grad_(x.requires_grad)
        return pytree.tree_unflatten(leaves, structure)


def _carries(signature: Signature) -> set[str]:
    return {signature.inputs[i].node for i in signature.indices(InputKind.CARRY)}
