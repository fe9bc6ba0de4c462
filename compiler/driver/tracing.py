"""Of a call the traced module, in the dtypes of the precision: kept from an earlier call, loaded, or traced now."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from shardc.compiler.driver.calls.call_keys import Keys, check_call, held, text_key
from shardc.compiler.driver.calls.passing import Call, Made, Passing, Taken
from shardc.compiler.driver.decide import Options
from shardc.compiler.driver.precision import add_casts, border_casts, call_dtypes, computed_as, info_as
from shardc.compiler.driver.recompute import mark_recomputed
from shardc.compiler.driver.saved import trace_folder
from shardc.compiler.driver.saved.saved_programs import Traces, about, load, save
from shardc.compiler.infer.marked_layouts import check_counts
from shardc.compiler.ir.signature import Signature, Traced
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.trace.module.reads import Reads, of_all
from shardc.compiler.trace.trace import trace


@dataclass
class Tracing:
    """One module's traces. real: callers are ranks, and pass pieces. trace: what is asked where nothing is kept."""

    module: nn.Module
    plan: Resolved
    mesh: Mesh
    options: Options
    keys: Keys
    real: bool
    trace: Callable[..., Traced] = trace
    traces: Traces = field(default_factory=Traces)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises PlanError for a call that forward, or the layouts of its inputs, cannot take."""
        check_call(self.module, args, kwargs)
        self.plan.calls.check_call(args, kwargs)
        self.plan.check_count("", "in", len(args))

    def tried(self, args: Sequence[Any], kwargs: Mapping[str, Any], made: Callable[[Taken | None], Made]) -> Made:
        """What is made of a call, of whose inputs real ranks pass pieces: of which, the graph may have to show."""
        return self.passing.tried(self.computed(args, kwargs), made) if self.real else made(None)

    def traced(self, args: Sequence[Any], kwargs: Mapping[str, Any], taken: Taken | None) -> Traced:
        """A copy that its user may change, with casts and what is to be recomputed marked."""
        return self.dressed(self._found(self.whole(args, kwargs, taken)), args, kwargs, taken)

    def whole(self, args: Sequence[Any], kwargs: Mapping[str, Any], taken: Taken | None) -> Call:
        """The call at global shapes and in the dtypes computed with. Real ranks pass pieces: sizes are multiplied by
        the mesh dims that split them."""
        call = self.computed(args, kwargs)
        return call if taken is None else self.passing.whole(call, taken)

    @property
    def passing(self) -> Passing:
        return Passing(self.module, self.plan, self.mesh, lambda call: self._found(call, grad=True))

    def symbolic(self, call: tuple[Any, Any]) -> Traced:
        """For all sizes. Raises ShardingError where forward cannot be traced so."""
        return self.trace(self.module, *call, symbolic=True, **self._known())

    def dressed(self, traced: Traced, args: Sequence[Any], kwargs: Mapping[str, Any], taken: Taken | None) -> Traced:
        """With the casts of the precision, and what is to be recomputed marked. Raises PlanError for layouts that do
        not fit."""
        if self.options.precision is not None:
            dtypes = {fqn: x.dtype for fqn, x in held(self.module).items()}
            given = call_dtypes(traced, tuple(args), dict(kwargs))
            traced = add_casts(traced, dtypes | given, self.options.precision)
        check_counts(traced.gm, self.plan)
        self._check_results(traced.signature)
        mark_recomputed(traced.gm, self.options.recompute)
        return traced if taken is None else taken.noted(traced)

    def save(self, path: str | os.PathLike[str], hashes: Mapping[str, str]) -> None:
        save(path, self.traces, hashes, self._about())

    def load(self, path: str | os.PathLike[str]) -> None:
        load(path, self.traces, self._about(), Reads(of_all(self.module)))

    def _found(self, call: tuple[Any, Any], grad: bool | None = None) -> Traced:
        """From what is kept, or made now."""
        known = self._known(grad)
        key = text_key(self.keys.of(*call), known["marks"], sorted(known["params"].items()), known["grad"])
        found = self.traces.find(key)
        if found is not None:
            return found
        about = self._about() if trace_folder.on() else None
        found = about and trace_folder.find(key, about, Reads(of_all(self.module)))
        if found is None:
            found = self.trace(self.module, *call, **known)
            if about is not None:
                trace_folder.keep(key, found, about)
        self.traces.keep(key, found)  # pyright: ignore
        return found  # pyright: ignore

    def _known(self, grad: bool | None = None) -> dict[str, Any]:
        """What tracing is told beside the call."""
        infos = {fqn: info_as(x, self.options.precision) for fqn, x in held(self.module).items()}
        grad = torch.is_grad_enabled() if grad is None else grad
        casts = border_casts(self.module, self.options.precision)
        return {"marks": self.plan.marked, "params": infos, "grad": grad, "casts": casts}

    def _about(self) -> dict[str, str]:
        told = self.options
        options = {"strict": told.strict, "recompute": told.recompute, "rng": told.rng, "precision": told.precision}
        return about(self.module, self.mesh, self.plan.report(), options | {"without": told.without})

    def computed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return pytree.tree_map(lambda x: computed_as(x, self.options.precision), (tuple(args), dict(kwargs)))

    def _check_results(self, signature: Signature) -> None:
        """Raises PlanError where forward returns another number of values than there are layouts for."""
        count = signature.out_spec.num_leaves
        result = pytree.tree_unflatten([None] * count, signature.out_spec)
        self.plan.calls.check_result(result)
        if isinstance(result, (tuple, list)):
            self.plan.check_count("", "out", len(result))
