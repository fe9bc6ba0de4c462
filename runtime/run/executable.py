"""A program ready to run, as one differentiable function: forward half, then backward half.

At run time there are only plain local tensors. A distributed parameter gives its local tensor at the
door and gets its gradient back as a DTensor of the same layout; no operator is ever dispatched on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.signature import InputKind, OutputKind, Signature
from shardc.compiler.spec.spec import Spec

Flat = Sequence[Tensor]
VERSION = attrgetter("_version")


class Engine(Protocol):
    """Runs one half of a program on the caller's tensors: real ranks, or all of them simulated."""

    def forward(self, inputs: Flat) -> tuple[list[Any], list[Any]]:
        """(outputs and mutations as the caller sees them, values saved for backward)."""
        ...

    def backward(
        self, saved: list[Any], tangents: Sequence[Tensor | None], carries: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients in the order of the signature's GRADIENT outputs; None where nothing that is given leads to one.
        What is `saved` may be taken out of the list, to be freed at its last use."""
        ...


class Ledger(Protocol):
    """Keeps gradients back at unsynchronised steps, and hands them in at the next synchronised backward."""

    def expect(self, specs: Mapping[str, Spec]) -> None: ...

    def keep(self, name: str, gradient: Tensor | None) -> None: ...

    def take(self, name: str) -> Tensor | None: ...


@dataclass(frozen=True)
class _Places:
    """Of a signature what every call needs to know, looked up once."""

    results: int  # how many of forward's returns are the caller's
    flat: tuple[bool, ...]  # which outputs, mutations included, no gradient flows into
    tangents: tuple[int, ...]  # the outputs that backward's tangents belong to
    carries: tuple[str, ...]
    given: int  # how many inputs a caller passes
    gradients: tuple[int, ...]  # the inputs that gradients belong to

    @classmethod
    def of(cls, signature: Signature) -> _Places:
        inputs, outputs = signature.inputs, signature.outputs
        tangents = [inputs[i].of for i in signature.indices(InputKind.TANGENT)]
        gradients = [outputs[i].of for i in signature.indices(OutputKind.GRADIENT)]
        return cls(
            len(signature.indices(OutputKind.OUTPUT)),
            tuple(not e.requires_grad for e in outputs),
            tuple(i for i in tangents if i is not None),
            tuple(inputs[i].name for i in signature.indices(InputKind.CARRY)),
            len(inputs) - len(signature.indices(InputKind.TANGENT, InputKind.CARRY)),
            tuple(i for i in gradients if i is not None),
        )


@dataclass(frozen=True)
class Executable:
    """One program bound to an engine. `inputs` of a call are in signature order, tangents and carries left out.

    kept: gradients (by position among the gradients) that stay pending here and go to the ledger: name and layout.
    watched: distributed inputs, by position, whose local tensors backward reads as they are by then. Autograd, which
    minds what it saves, does not see changes that go through a label.
    """

    signature: Signature
    engine: Engine
    kept: Mapping[int, tuple[str, Spec]]
    ledger: Ledger
    watched: Sequence[int] = ()

    @cached_property
    def _places(self) -> _Places:
        return _Places.of(self.signature)

    def __call__(self, inputs: Flat) -> tuple[list[Any], list[Any]]:
        """(outputs, mutations): outputs carry autograd's graph where the program has a backward half."""
        count = self._places.results
        with _casts_as_traced():
            results = self._results(inputs)
        return results[:count], results[count:]

    def _results(self, inputs: Flat) -> list[Any]:
        if not self._places.tangents:
            return self.engine.forward(inputs)[0]
        results = list(_Run.apply(self, *inputs))
        self.ledger.expect(dict(self.kept.values()))  # their backward may come after the next forward
        return results

    def halfway(self, inputs: Flat) -> tuple[list[Any], list[Any]]:
        """(outputs and mutations, values saved for `gradients`), without autograd."""
        with _casts_as_traced():
            found = self.engine.forward(inputs)
        self.ledger.expect(dict(self.kept.values()))
        return found

    def gradients(self, saved: list[Any], tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Backward, with what was kept back put in and what is to be kept taken out. The list is used up."""
        carries = [self.ledger.take(name) for name in self._places.carries]
        with _casts_as_traced():
            found = self.engine.backward(saved, tangents, carries)
        for i, (name, _) in self.kept.items():
            self.ledger.keep(name, found[i])
            found[i] = None
        return found

    def changed(self, tensors: Sequence[Tensor], versions: Sequence[int]) -> RuntimeError:
        """In autograd's words: which of the watched inputs has another version than forward saw."""
        every = zip(self.watched, tensors, versions, strict=True)
        i, x, version = next(item for item in every if item[1]._version != item[2])
        return RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{self.signature.inputs[i].name}, of shape {list(x.shape)}, is at version {x._version}; expected version "
            f"{version} instead. Hint: call backward before what changes it, or run forward again after it"
        )


@contextmanager
def _casts_as_traced() -> Iterator[None]:
    """Autocast off: its casts are in the traced program, and must not be made twice."""
    with ExitStack() as stack:
        for kind, _ in autocast_state():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device kinds that autocast is on for here, and to what."""
    return tuple((k, torch.get_autocast_dtype(k)) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k))


class _Run(torch.autograd.Function):
    """The program as autograd sees it: one node, whatever the model."""

    @staticmethod
    def forward(ctx: Any, program: Executable, *inputs: Tensor) -> tuple[Any, ...]:
        results, saved = program.engine.forward(inputs)
        # To autograd no result is a view, which nobody could change in place; versions it shares all the same.
        results = [r.detach() if isinstance(r, Tensor) and r._is_view() else r for r in results]
        ctx.program = program
        ctx.watched = [inputs[i] for i in program.watched]
        ctx.versions = list(map(VERSION, ctx.watched))
        ctx.tensors = [i for i, v in enumerate(saved) if isinstance(v, Tensor)]
        ctx.others = [None if isinstance(v, Tensor) else v for v in saved]
        ctx.save_for_backward(*(saved[i] for i in ctx.tensors))
        ctx.set_materialize_grads(False)
        flat = [r for r, f in zip(results, program._places.flat, strict=False) if f and isinstance(r, Tensor)]
        ctx.mark_non_differentiable(*flat)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        program: Executable = ctx.program
        if ctx.versions != list(map(VERSION, ctx.watched)):
            raise program.changed(ctx.watched, ctx.versions)
        saved, places = _unpacked(ctx), program._places
        tangents = [None if grads[of] is None else grads[of].contiguous() for of in places.tangents]
        out: list[Any] = [None] * places.given
        for source, grad in zip(places.gradients, program.gradients(saved, tangents), strict=True):
            out[source] = grad
        if torch.is_grad_enabled():  # create_graph=True: as constants they would be wrong without a word
            out = [g if g is None else _Once.apply(g, torch.zeros((), requires_grad=True)) for g in out]
        return None, *out


def _unpacked(ctx: Any) -> list[Any]:
    """What forward saved. Unless the graph is retained nothing else holds it from here on."""
    saved = list(ctx.others)
    for i, value in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        saved[i] = value
    ctx.maybe_clear_saved_tensors()
    return saved


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ShardingError(
            "a gradient of the compiled module is differentiated once more, and its program has no second backward",
            help="leave create_graph=True out, or keep what needs second derivatives outside of the compiled module",
        )
