"""The unsharded module, run on one device with given values: what every program is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.signature import Input, InputKind, OutputKind, Signature
from shardc.compiler.plan.layout import Precision
from shardc.compiler.trace.eager_draws import NumberedDraws
from shardc.compiler.trace.module.attributes import Attributes
from shardc.compiler.trace.module.border_casts import casting


@dataclass(frozen=True)
class Original:
    """`values()` gives parameters and buffers whole, by FQN. training, casts: the modes it was traced in, by
    module in `modules()` order, and by device kind for autocast. rng: whose random numbers it draws."""

    module: nn.Module
    signature: Signature
    values: Callable[[], Mapping[str, Tensor]]
    training: tuple[bool, ...] = ()
    casts: tuple[tuple[str, torch.dtype], ...] = ()
    rng: str = "counter"
    precision: Precision | None = None
    borders: Mapping[str, torch.dtype] = field(default_factory=dict)  # modules whose inputs arrive in a dtype of theirs

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The program's inputs at global shapes, tangents left out."""
        batch = iter(self.signature.flatten_inputs(args, kwargs))
        held = self.values()
        out: list[Tensor] = []
        for entry in self.signature.inputs:
            if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                out.append(held[entry.name])
            elif entry.kind is InputKind.CONSTANT:
                assert entry.value is not None
                out.append(entry.value)
            elif entry.kind is InputKind.BATCH:
                out.append(next(batch))
        return out

    def run(self, flat: Sequence[Tensor], divided: Sequence[int]) -> tuple[list[Any], list[Tensor], dict[int, Any]]:
        """(outputs, tangents, gradients by output position) of the module under autograd. divided: of each input of
        the program, by what it divides a tangent before use, or the gradient of a parameter."""
        if not self.signature.holds():
            changed = self.signature.reads.changed() if self.signature.reads is not None else []
            raise ShardingError(
                f"the module is not as it was when this program was traced: {', '.join(changed)}",
                help="set it back, or call the module and verify the program of that call",
            )
        late = (InputKind.TANGENT, InputKind.CARRY)
        entries = [e for e in self.signature.inputs if e.kind not in late]
        leaves = [x.detach().clone().requires_grad_(e.requires_grad) for x, e in zip(flat, entries, strict=True)]
        needs = any(e.requires_grad for e in entries) and self.signature.indices(InputKind.TANGENT)
        with NumberedDraws() if self.rng == "counter" else nullcontext():
            with torch.set_grad_enabled(bool(needs)), self._modes():
                computed = [self._cast(x, e) for x, e in zip(leaves, entries, strict=True)]
                args, kwargs = self._arguments(computed)
                with casting(self.module, self.borders), self._effects(args, kwargs) as effects:
                    result = functional_call(self.module, self._held(computed), args, kwargs)
                    outputs = [self._cast(x) for x in (*pytree.tree_leaves(result), *effects())]
            tangents = self._tangents(outputs)
            return outputs, tangents, self._gradients(leaves, outputs, tangents, divided)

    @contextmanager
    def _effects(self, args: Any, kwargs: Any) -> Iterator[Callable[[], list[Any]]]:
        """What gives the values that forward set elsewhere; all of it is put back."""
        attributes = Attributes(self.module)
        attributes.watch_call((args, kwargs), str)
        for effect in self.signature.effects:
            attributes.watch(effect.name, effect.find((args, kwargs)))
        try:
            yield lambda: attributes.effects()[1]
        finally:
            attributes.restore()

    def _cast(self, x: Any, entry: Input | None = None) -> Any:
        """An input as it is computed with; without an entry an output as it is returned."""
        kinds = (InputKind.PARAMETER, InputKind.BATCH)
        wanted = self.precision and (self.precision.output if entry is None else self.precision.param)
        cast = wanted and isinstance(x, Tensor) and x.is_floating_point() and (entry is None or entry.kind in kinds)
        return x.to(wanted) if cast else x

    @contextmanager
    def _modes(self) -> Iterator[None]:
        modules = list(self.module.modules())
        before = [m.training for m in modules]
        try:
            for module, mode in zip(modules, self.training, strict=False):
                module.training = mode
            with ExitStack() as stack:
                for kind, dtype in self.casts:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
                yield
        finally:
            for module, mode in zip(modules, before, strict=True):
                module.training = mode

    def _arguments(self, leaves: list[Tensor]) -> tuple[tuple, dict]:
        flat = [leaf.constant if leaf.input is None else leaves[leaf.input] for leaf in self.signature.leaves]
        args, kwargs = pytree.tree_unflatten(flat, self.signature.in_spec)
        return tuple(args), dict(kwargs)

    def _held(self, leaves: list[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self.signature.inputs, leaves, strict=False)
        held = {e.name: x for e, x in pairs if e.kind in (InputKind.PARAMETER, InputKind.BUFFER)}
        return held | {alias: held[name] for alias, name in self.signature.tied.items() if name in held}

    def _tangents(self, outputs: list[Any]) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        entries = [self.signature.inputs[i] for i in self.signature.indices(InputKind.TANGENT)]
        tensors = [outputs[e.of] for e in entries if e.of is not None]
        return [torch.randn(t.shape, generator=draw, dtype=t.dtype).to(t.device) for t in tensors]

    def _gradients(
        self, leaves: list[Tensor], outputs: list[Any], tangents: list[Tensor], divided: Sequence[int]
    ) -> dict[int, Any]:
        places = self.signature.indices(OutputKind.GRADIENT)
        if not tangents or not places:
            return {}
        starts = self.signature.indices(InputKind.TANGENT)
        ends = [outputs[self.signature.inputs[i].of or 0] for i in starts]
        sources = [self.signature.outputs[p].of or 0 for p in places]
        tangents = [t / divided[i] for t, i in zip(tangents, starts, strict=True)]
        found = torch.autograd.grad(ends, [leaves[i] for i in sources], tangents, allow_unused=True)
        return {p: g if g is None else g / divided[i] for p, g, i in zip(places, found, sources, strict=True)}
