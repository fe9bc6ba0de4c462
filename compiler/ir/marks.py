"""One identity operator, `shardc::mark`, that carries a key through tracing: constraints and module borders.

A traced graph has lost the modules it came from. A mark stands where a value crossed a module's
border, or where the user called `constrain`, as one node in forward and one in backward:

    %mark: f32[8, 16] = shardc.mark(%x, "layers.0|in|0")            on the value
    %mark_1: f32[8, 16] = shardc.mark(%grad, "layers.0|in|0|grad")  on its gradient

Keys: `FQN|in|PATH`, `FQN|out|PATH`, `constrain|TEXT`, each with `|grad` behind it in backward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard, _StridedShard

from shardc.compiler.errors import ShardingError
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec

CONSTRAIN = "constrain"
GRAD = "|grad"
REDUCTIONS = ("sum", "avg", "product", "max", "min", "band", "bor", "bxor")
_PLACEMENT = re.compile(r"(?P<kind>S|_S|R|P)(?:\((?P<args>[^()]*)\))?")


@torch.library.custom_op("shardc::mark", mutates_args=())
def mark(x: Tensor, key: str) -> Tensor:
    """x unchanged. A copy, because an operator must not return its own argument."""
    return x.clone()


MARK = torch.ops.shardc.mark.default


@mark.register_fake
def _fake(x: Tensor, key: str) -> Tensor:
    """In memory as x is, not packed as a clone would be: forward may ask, and the mark is removed later."""
    return x.new_empty_strided(x.shape, x.stride())


def _remember_key(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.key = inputs[1]


def _mark_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return mark(grad, ctx.key + GRAD), None


mark.register_autograd(_mark_gradient, setup_context=_remember_key)


@mark.register_vmap
def _under_vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, key: str) -> tuple[Tensor, int | None]:
    return mark(x, key), in_dims[0]


@dataclass(frozen=True)
class UnlessPending:
    """In a wish: this layout, but a value pending over one of these mesh dims stays so."""

    layout: Spec
    axes: tuple[str, ...]

    def of(self, found: Spec, mesh: Mesh) -> Spec:
        """What becomes of a value laid out as found."""
        pending, layout = {a: op for a, op in found.pending if a in self.axes}, self.layout
        for axis in pending:
            layout = layout.without(axis, mesh)
        return layout.with_pending(pending, mesh)


class Marked(torch.autograd.Function):
    """The mark of a value, inside torch.func's transforms too: the operator alone knows nothing of them."""

    @staticmethod
    def forward(x: Tensor, key: str) -> Tensor:
        return MARK(x, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.key = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Marked.apply(grad, ctx.key + GRAD), None  # pyright: ignore[reportReturnType]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """While torch traces, what a function of Python gives as a tangent is lost."""
        fqn = ctx.key.partition("|")[0]
        raise ShardingError(
            f"a forward-mode derivative (torch.func.jvp, forward_ad) passes {fqn or 'the model'}, which the plan names",
            help="take it in reverse (torch.func.grad, vjp), or let the plan name no module inside of it",
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return Marked.apply(*args), in_dims[0]


@runtime_checkable
class HasText(Protocol):
    """A layout that writes itself as stable text, such as `shardc.Layout`."""

    def to_text(self) -> str: ...


def constrain(x: Tensor, layout: Placement | HasText) -> Tensor:
    """x, with its layout fixed where this line is traced; plain eager runs get x itself back.

    `layout` is a torch placement, meaning the only mesh dim, or a `shardc.Layout` naming several.
    """
    if not torch.compiler.is_compiling():
        return x
    return torch.ops.shardc.mark.default(x, f"{CONSTRAIN}|{layout_text(layout)}")


def layout_text(layout: Placement | HasText) -> str:
    """Stable text of a layout: a placement's own, or what the layout's `to_text()` says."""
    if isinstance(layout, (Shard, _StridedShard, Replicate, Partial)):
        return placement_text(layout)
    if isinstance(layout, HasText):
        return layout.to_text()
    raise TypeError(f"a layout is a torch placement or a shardc.Layout, not {type(layout).__name__}")


def placement_text(placement: Placement) -> str:
    """`S(0)`, `_S(0, 3)` (dim, split factor), `R` or `P(sum)`, as torch itself prints them."""
    # _StridedShard derives from Shard in some torch releases, so it is asked for first.
    if isinstance(placement, _StridedShard):
        return f"_S({placement.dim}, {placement.split_factor})"
    if isinstance(placement, Shard):
        return f"S({placement.dim})"
    if isinstance(placement, Replicate):
        return "R"
    if isinstance(placement, Partial):
        return f"P({placement.reduce_op})"
    raise TypeError(f"a placement is Shard, Replicate or Partial, not {type(placement).__name__}")


def parse_placement(text: str) -> Placement:
    """The placement whose `placement_text` this is; ValueError names the text where there is none."""
    match = _PLACEMENT.fullmatch(text.strip())
    kind, args = (match["kind"], match["args"]) if match else ("", None)
    try:
        if kind == "S":
            return Shard(int(args or ""))
        if kind == "_S":
            dim, factor = (args or "").split(",")
            return _StridedShard(int(dim), split_factor=int(factor))
        if kind == "R" and args is None:
            return Replicate()
        if kind == "P" and (args or "sum") in REDUCTIONS:
            return Partial(args or "sum")
    except ValueError:
        pass
    raise ValueError(f"no placement reads {text!r}: expected S(dim), _S(dim, factor), R or P(reduction)")


@dataclass(frozen=True)
class MarkKey:
    """A mark's key, taken apart: `kind` is "in", "out" or "constrain", `grad` says it is the backward one.

    For a module's border `fqn` and `path` say which value it is (path "0", "1[0]", "kw:mask", or "" for
    a bare output); for a constraint `text` is the layout's.
    """

    kind: str
    fqn: str = ""
    path: str = ""
    text: str = ""
    grad: bool = False


def border_key(fqn: str, side: str, path: str) -> str:
    """The key of a value that crosses a module's border; side is "in" or "out"."""
    return f"{fqn}|{side}|{path}"


def parse_key(key: str) -> MarkKey:
    """What a mark's second argument says."""
    grad = key.endswith(GRAD)
    head, _, rest = key.removesuffix(GRAD).partition("|")
    if head == CONSTRAIN and not rest.startswith(("in|", "out|")):
        return MarkKey(CONSTRAIN, text=rest, grad=grad)
    side, _, path = rest.partition("|")
    return MarkKey(side, fqn=head, path=path, grad=grad)
