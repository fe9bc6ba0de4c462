"""Random programs, small and odd, each written as the Python that says it.

A draw is text: what fails can be pasted into a test and cut down by hand.
"""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, Replicated

WORDS = {
    w.__name__: w
    for w in (
        Partial, Replicate, Shard, ColwiseParallel, PrepareModuleInput, PrepareModuleInputOutput, PrepareModuleOutput,
        RowwiseParallel, SequenceParallel, FullyShard, Layout, Mesh, Plan, Replicated,
    )
} | {"torch": torch, "nn": nn, "F": F, "shardc": shardc}  # fmt: skip
SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 1)
LARGEST = 1500  # elements of one value
VOCAB = 7


@dataclass(frozen=True)
class Child:
    """A module or parameter of the drawn model. `ndims`: of what each of its calls was given."""

    name: str
    kind: str
    code: str
    ndim: int = 0


@dataclass(frozen=True)
class Drawn:
    """A model as source text, and the shapes of what it is called with: of integers below VOCAB where `ids`."""

    source: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    children: tuple[Child, ...]
    outputs: tuple[int, ...]  # how many dims each has
    differentiable: str = "x y"  # names of the inputs that need a gradient
    backwards: str = ""  # names of the inputs whose dims lie in memory in the other order; "weights": parameters too

    def model(self) -> nn.Module:
        """The model with the weights of one seed, in double precision."""
        torch.manual_seed(0)
        model = model_of(self.source).double()
        for parameter in model.parameters() if "weights" in self.backwards else ():
            parameter.data = backwards(parameter.data)
        return model

    def tensors(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(1)
        made = [
            torch.randint(VOCAB, shape, generator=draw)
            if name == "ids"
            else torch.randn(shape, generator=draw, dtype=torch.double)
            for name, shape in self.inputs
        ]
        names = [name for name, _ in self.inputs]
        laid = [backwards(x) if n in self.backwards.split() else x for n, x in zip(names, made, strict=True)]
        return [x.requires_grad_(n in self.differentiable and n != "ids") for n, x in zip(names, laid, strict=True)]

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n}{list(s)}" for n, s in self.inputs)
        how = f"with gradients: {self.differentiable or 'none'}; backwards in memory: {self.backwards or 'none'}"
        return f"\n{self.source}\ninputs: {inputs}; {how}\n"


def backwards(x: Tensor) -> Tensor:
    """The same tensor, its last dim the slowest in memory."""
    order = [*range(x.dim())][::-1]
    return x.permute(order).contiguous().permute(order)


def model_of(source: str) -> nn.Module:
    """The `Model` that a source text defines."""
    path = "drawn_model.py"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    names = dict(WORDS)
    exec(compile(source, path, "exec"), names)
    return names["Model"]()  # pyright: ignore


# --- programs


def program(random: Random, most: int = 8) -> Drawn:
    """A model of a few operators over one or two tensors, and perhaps integers."""
    w = _Writer(random)
    for name in ("x", "y")[: w.one(1, 1, 2)]:
        w.values[name] = torch.empty(w.shape(w.one(2, 2, 3, 3, 1, 4)), device="meta", requires_grad=True)
    if w.one(False, False, True):
        w.values["ids"] = torch.empty(w.shape(w.one(1, 2)), device="meta", dtype=torch.int64)
    w.inputs = tuple((name, tuple(v.shape)) for name, v in w.values.items())
    for _ in range(w.number(3, most)):
        w.step()
    return w.finish()


class _Writer:
    """Writes a forward line by line, each run on meta tensors at once to know what it gives."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.values: dict[str, Tensor] = {}
        self.inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
        self.children: list[Child] = []
        self.lines: list[str] = []
        self.used: set[str] = set()
        self.after: list[str] = []  # what is done to the children once they are there
        self.root = nn.Module()

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def shape(self, ndim: int) -> tuple[int, ...]:
        sizes = SIZES if ndim < 4 else SIZES[:5]
        return tuple(self.one(*sizes) for _ in range(ndim))

    def floats(self, least: int = 0, most: int = 4) -> list[str]:
        """Values of so many dims, the newest first."""
        found = [n for n, v in self.values.items() if v.is_floating_point() and least <= v.dim() <= most]
        return found[::-1]

    def value(self, least: int = 0, most: int = 4) -> str | None:
        """One of them; what nothing uses yet more often than others."""
        found = self.floats(least, most)
        fresh = [n for n in found if n not in self.used]
        return self.one(*found, *fresh, *fresh) if found else None

    def step(self) -> None:
        code = self.one(*STEPS)(self) or f"torch.tanh({self.value()})"
        with torch.device("meta"):
            value = eval(code, WORDS, {"self": self.root, **self.values})
        if value.numel() > LARGEST:
            return
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {code}")
        self.used |= set(re.findall(r"\w+", code))
        # here all is single, as the modules are; what a line makes double on the way is so when all is double
        self.values[name] = value.float() if value.is_floating_point() else value

    def child(self, kind: str, code: str, ndim: int) -> str:
        """The name of a new module or parameter."""
        name = f"{kind}{sum(c.kind == kind for c in self.children)}"
        self.children.append(Child(name, kind, code, ndim))
        with torch.device("meta"):
            setattr(self.root, name, eval(code, WORDS))
        return name

    def finish(self) -> Drawn:
        """What nothing uses is returned, up to three values, and now and then one that something does use."""
        returned = [n for n in self.floats() if n not in self.used][:3] or self.floats()[:1]
        if self.one(False, False, False, True):
            returned.append(self.one(*self.floats()))
        body = "".join(f"        {line}\n" for line in self.lines)
        made = "".join(f"        self.{c.name} = {c.code}\n" for c in self.children)
        made += "".join(f"        {line}\n" for line in dict.fromkeys(self.after))
        source = (
            "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{made}\n    def forward(self, {', '.join(n for n, _ in self.inputs)}):\n{body}"
            f"        return {', '.join(returned)}\n"
        )
        ndims = tuple(self.values[n].dim() for n in returned)
        grads, lies = self.one("x y", "x y", "x", ""), self.one("", "", "x", "weights", "x weights", "ids y")
        return Drawn(source, self.inputs, tuple(self.children), ndims, grads, lies)


def _linear(w: _Writer) -> str | None:
    x = w.value(1)
    if x is None:
        return None
    ndim, width = w.values[x].dim(), w.values[x].shape[-1]
    fitting = [c for c in w.children if c.kind == "linear" and getattr(w.root, c.name).in_features == width]
    if fitting and w.one(False, False, True):
        again = w.one(*fitting)
        w.children[w.children.index(again)] = Child(again.name, again.kind, again.code, min(again.ndim, ndim))
        return f"self.{again.name}({x})"
    bias = w.one("", "", ", bias=False")
    return f"self.{w.child('linear', f'nn.Linear({width}, {w.one(*SIZES)}{bias})', ndim)}({x})"


def _norm(w: _Writer) -> str | None:
    x = w.value(1)
    if x is None or w.values[x].shape[-1] == 1:  # what is left of a single value is rounding
        return None
    v = w.values[x]
    codes = [f"nn.LayerNorm({v.shape[-1]})", f"nn.LayerNorm({v.shape[-1]}, elementwise_affine=False)",
             f"nn.RMSNorm({v.shape[-1]})"]  # fmt: skip
    if v.dim() > 1:
        codes.append(f"nn.LayerNorm({tuple(v.shape[-2:])})")
    if v.dim() == 3:
        codes.append(f"nn.BatchNorm1d({v.shape[1]})")
        codes.append(f"nn.GroupNorm({_divisor(w, v.shape[1])}, {v.shape[1]})")
    return f"self.{w.child('norm', w.one(*codes), v.dim())}({x})"


def _conv(w: _Writer) -> str | None:
    found = [n for n in w.floats(3, 3) if w.values[n].shape[-1] >= 2]
    if not found:
        return None
    x = w.one(*found)
    code = f"nn.Conv1d({w.values[x].shape[1]}, {w.one(1, 2, 3, 5)}, {w.one(1, 2, 3)}, padding=1)"
    return f"self.{w.child('conv', code, 3)}({x})"


def _embedding(w: _Writer) -> str | None:
    if "ids" not in w.values:
        return None
    ndim = w.values["ids"].dim()
    padding = w.one("", "", ", padding_idx=2")
    return f"self.{w.child('emb', f'nn.Embedding({VOCAB}, {w.one(*SIZES)}{padding})', ndim)}(ids)"


def _parameter(w: _Writer) -> str | None:
    x = w.value()
    shape = tuple(w.values[x].shape)
    shape = shape[w.number(0, len(shape)) :]
    shape = tuple(n if w.one(True, True, False) else 1 for n in shape)
    name = w.child("weight", f"nn.Parameter(torch.randn({shape}))", len(shape))
    return w.one(f"{x} * self.{name}", f"{x} + self.{name}", f"self.{name} - {x}")


def _shared_weight(w: _Writer) -> str | None:
    """A weight used outside of its module."""
    linears = {c.name: getattr(w.root, c.name) for c in w.children if c.kind in ("linear", "emb")}
    pairs = [
        (x, name, m.weight.shape.index(w.values[x].shape[-1]))
        for x in w.floats(1)
        for name, m in linears.items()
        if w.values[x].shape[-1] in m.weight.shape
    ]
    if not pairs:
        return None
    x, name, at = w.one(*pairs)
    return f"F.linear({x}, self.{name}.weight{'.t()' if at == 0 else ''})"


def _pointwise(w: _Writer) -> str:
    x = w.value()
    return w.one(
        f"F.relu({x})", f"F.gelu({x})", f"torch.tanh({x})", f"F.silu({x})", f"{x}.sigmoid() * {x}", f"{x} * 0.5",
        f"{x} + 1.5", f"{x}.pow(2)", f"{x}.clamp(-1.0, 0.5)", f"F.dropout({x}, 0.0)", f"{x}.detach() * {x}",
        f"torch.where({x} > 0.1, {x}, -0.3)", f"1.0 / ({x}.pow(2) + 1)", f"{x}.contiguous()", f"{x} / 3 + {x}",
    )  # fmt: skip


def _binary(w: _Writer) -> str | None:
    pairs = [(a, b) for a in w.floats() for b in w.floats() if _together(w.values[a].shape, w.values[b].shape)]
    if not pairs:
        return None
    a, b = w.one(*pairs)
    return w.one(
        f"{a} + {b}", f"{a} * {b}", f"{a} - {b}", f"torch.where({a} > 0, {a}, {b})", f"torch.add({a}, {b}, alpha=2)",
        f"{a} / ({b}.pow(2) + 1)",
    )  # fmt: skip


def _together(a: Sequence[int], b: Sequence[int]) -> bool:
    try:
        return math.prod(torch.broadcast_shapes(a, b)) <= LARGEST
    except RuntimeError:
        return False


def _matmul(w: _Writer) -> str | None:
    floats, found = w.floats(1), []
    for a in floats:
        for b in floats:
            s, t = w.values[a].shape, w.values[b].shape
            if len(t) >= 2 and s[-1] == t[-1] and (len(s) == 1 or _together(s[:-2], t[:-2])):
                found.append(f"{a} @ {b}.transpose(-1, -2)")
            if len(t) >= 2 and s[-1] == t[-2] and (len(s) == 1 or _together(s[:-2], t[:-2])):
                found.append(f"{a} @ {b}")
            if len(t) == 1 and s[-1] == t[0]:
                found.append(f"{a} @ {b}")
            if len(s) == len(t) == 3 and s[:2] == t[:2]:
                found.append(f'torch.einsum("btd,bte->bde", {a}, {b})')
            if len(s) == len(t) == 2 and s[0] == t[0]:
                found.append(f'torch.einsum("bi,bj->ij", {a}, {b})')
    return w.one(*found) if found else None


def _heads(w: _Writer) -> str | None:
    x = w.value(3, 3)
    if x is None:
        return None
    width = w.values[x].shape[-1]
    code = f"nn.MultiheadAttention({width}, {_divisor(w, width)}, batch_first=True)"
    return f"self.{w.child('mha', code, 3)}({x}, {x}, {x}, need_weights=False)[0]"


def _tied(w: _Writer) -> str | None:
    """Two Linears that share a weight; or one whose weight is frozen."""
    pairs = [
        (x, c.name, m.out_features)
        for x in w.floats(1)
        for c in w.children
        if c.kind == "linear" and (m := getattr(w.root, c.name)).in_features == w.values[x].shape[-1]
    ]
    if not pairs:
        return None
    x, name, out = w.one(*pairs)
    if w.one(True, False):
        w.after.append(f"self.{name}.weight.requires_grad_(False)")
        return f"self.{name}({x})"
    new = w.child("linear", f"nn.Linear({w.values[x].shape[-1]}, {out})", w.values[x].dim())
    w.after.append(f"self.{new}.weight = self.{name}.weight")
    return f"self.{new}({x})"


def _made_weight(w: _Writer) -> str | None:
    """A weight computed from a parameter."""
    linears = {c.name: getattr(w.root, c.name) for c in w.children if c.kind == "linear"}
    pairs = [(x, n) for x in w.floats(1) for n, m in linears.items() if m.in_features == w.values[x].shape[-1]]
    if not pairs:
        return None
    x, name = w.one(*pairs)
    weight = f"self.{name}.weight"
    made = w.one(f"{weight} * 2", f"{weight} / {weight}.norm()", f"{weight} / {weight}.norm(dim=0)", f"{weight}.tril()",
                 f"F.normalize({weight}, dim=1)")  # fmt: skip
    return f"F.linear({x}, {made})"


def _attention(w: _Writer) -> str | None:
    x = w.value(3, 4)
    if x is None:
        return None
    return f"F.scaled_dot_product_attention({x}, {x}, {x}, is_causal={w.one(True, False)})"


def _reduction(w: _Writer) -> str | None:
    x = w.value(1)
    if x is None:
        return None
    n = w.values[x].dim()
    dims = sorted({w.number(0, n - 1) for _ in range(w.one(1, 1, 2))})
    many, keep = w.one(dims, [d - n for d in dims]), w.one("", ", keepdim=True")
    return w.one(
        f"{x}.sum({many}{keep})", f"{x}.mean({many}{keep})", f"{x}.amax({many}{keep})", f"{x}.sum()", f"{x}.mean()",
        f"{x}.var({many}, correction=0{keep})", f"torch.logsumexp({x}, {many}{keep})", f"{x}.cumsum({dims[0]})",
        f"torch.linalg.vector_norm({x} + 3, 2, {many}{keep})",
    )  # fmt: skip


def _ordered(w: _Writer) -> str | None:
    """What depends on the order of elements along a dim."""
    x = w.value(1)
    if x is None:
        return None
    rank = w.values[x].dim()
    d = w.number(0, rank - 1)
    n = w.values[x].shape[d]
    # in which order topk takes equal values torch leaves open
    apart = f"({x} + torch.linspace(0, 0.01, {n}).double().reshape({[n if i == d else 1 for i in range(rank)]}))"
    return w.one(
        f"{x}.sort({d})[0]", f"{apart}.topk({w.number(1, n)}, {d})[0]", f"{x}.max({d})[0]", f"{x}.cumprod({d})",
        f"{x}.prod({d})", f"{x}.std({d}, correction=0)" if n > 2 else f"{x}.min({d}, keepdim=True)[0]",
        f"F.one_hot({x}.argmax({d}), {n}).double()", f"{x}.logcumsumexp({d})", f"{x}.median({d})[0]",
        f"{x}.scatter({d}, {x}.argmax({d}, keepdim=True), 0.0)", f"{x}.gather({d}, {x}.argsort({d}))",
    )  # fmt: skip


def _in_place(w: _Writer) -> str | None:
    x = w.value(1)
    if x is None:
        return None
    return w.one(
        f"{x}.clone().mul_(2).add_({x})", f"F.relu({x} + 0, inplace=True)", f"{x}.clone().clamp_(-0.5, 0.5)",
        f"torch.zeros_like({x}).copy_({x})", f"{x}.clone().index_fill_(0, torch.tensor([0]), 0.5)",
    )  # fmt: skip


def _pool(w: _Writer) -> str | None:
    x = w.value(3, 4)
    if x is None:
        return None
    shape = w.values[x].shape
    if len(shape) == 3:
        return w.one(f"F.max_pool1d({x}, 2, padding=1)", f"F.avg_pool1d({x}, {min(2, shape[2])})",
                     f"F.adaptive_avg_pool1d({x}, 2)", f"F.interpolate({x}, scale_factor=2)")  # fmt: skip
    code = f"nn.Conv2d({shape[1]}, {w.one(1, 2, 3)}, {w.one(1, 3)}, padding=1, groups=1)"
    if w.one(True, False):
        return f"self.{w.child('conv', code, 4)}({x})"
    return w.one(f"F.max_pool2d({x}, 2, padding=1)", f"F.pixel_unshuffle(F.pad({x}, (0, 0)), 1)")


def _softmax(w: _Writer) -> str | None:
    x = w.value(1)
    if x is None:
        return None
    d = w.number(-1, w.values[x].dim() - 1)
    return w.one(f"F.softmax({x}, {d})", f"F.log_softmax({x}, {d})")


def _loss(w: _Writer) -> str | None:
    x = w.value(2, 3)
    if x is None:
        return None
    n, c, *rest = w.values[x].shape
    labels = f"torch.arange({n * math.prod(rest)}).reshape({[n, *rest]}) % {c}"
    how = w.one("", ', reduction="sum"', ', reduction="none"', ", label_smoothing=0.1", ", ignore_index=0")
    if c == 1 and how == ", ignore_index=0":
        how = ""
    return f"F.cross_entropy({x}, {labels}{how})"


def _swap(w: _Writer) -> str | None:
    x = w.value(2)
    if x is None:
        return None
    n = w.values[x].dim()
    order = w.random.sample(range(n), n)
    a, b = w.number(0, n - 1), w.number(0, n - 1)
    return w.one(f"{x}.transpose({a}, {b - n})", f"{x}.permute({order})", f"{x}.movedim({a}, {b})")


def _reshape(w: _Writer) -> str | None:
    x = w.value()
    shape = list(w.values[x].shape)
    kind = w.one("merge", "split", "split", "ones", "refold")
    if kind == "merge" and len(shape) > 1:
        at = w.number(0, len(shape) - 2)
        return w.one(f"{x}.flatten({at}, {at + 1})", f"{x}.reshape({[*shape[:at], -1, *shape[at + 2 :]]})")
    if kind == "split" and shape and len(shape) < 4:
        at = w.number(0, len(shape) - 1)
        first = _divisor(w, shape[at])
        new = [*shape[:at], first, shape[at] // first, *shape[at + 1 :]]
        return w.one(f"{x}.reshape({new})", f"{x}.unflatten({at}, {(first, -1)})")
    if kind == "refold" and len(shape) > 1:
        size = math.prod(shape)
        first = _divisor(w, size)
        return f"{x}.reshape({[first, size // first]})"
    if len(shape) > 3:
        return f"{x}.flatten()"
    at = w.number(0, len(shape))
    wider = [*shape[:at], 3, *shape[at:]]
    return w.one(f"{x}.unsqueeze({at})", f"{x}.unsqueeze({at}).expand({wider})", f"{x}.squeeze()")


def _divisor(w: _Writer, n: int) -> int:
    return w.one(*[d for d in range(1, n + 1) if n % d == 0])


def _piece(w: _Writer) -> str | None:
    x = w.value(1)
    if x is None:
        return None
    d = w.number(0, w.values[x].dim() - 1)
    n = w.values[x].shape[d]
    start = w.number(0, n - 1)
    length = w.number(1, n - start)
    ways = [
        f"{x}.narrow({d}, {start}, {length})", f"{x}.select({d}, {start})", f"{x}.flip([{d}])", f"{x}.roll(1, {d})",
        f"{x}.repeat_interleave(2, {d})", f"F.pad({x}, (1, 2))", f"{x}[{':, ' * d}{start}::2]",
    ]  # fmt: skip
    if n > 1:
        part = -(-n // 2)
        ways += [
            f"{x}.chunk(2, {d})[{w.one(0, 1)}]",
            f"torch.cat({x}.split({part}, {d})[::-1], {d})",
            f"{x}.unbind({d})[{start}]",
        ]
    if w.values[x].dim() > 1:
        ways.append(f"{x}.tril()")
        shape = [n, *[1] * (w.values[x].dim() - d - 1)]
        ways.append(f"{x}.masked_fill(torch.arange({n}).view({shape}) % 2 == 0, 0.5)")
    return w.one(*ways)


def _join(w: _Writer) -> str | None:
    found = []
    for a in w.floats(1):
        for b in w.floats(1):
            s, t = w.values[a].shape, w.values[b].shape
            if len(s) == len(t):
                fits = [d for d in range(len(s)) if s[:d] + s[d + 1 :] == t[:d] + t[d + 1 :]]
                found += [f"torch.cat([{a}, {b}], {d})" for d in fits]
            if s == t and len(s) < 4:
                found.append(f"torch.stack([{a}, {b}], {len(s) - 1})")
    return w.one(*found) if found else None


def _lookup(w: _Writer) -> str | None:
    found = [n for n in w.floats(1) if w.values[n].dim() < 4]
    if not found or "ids" not in w.values:
        return None
    x = w.one(*found)
    d = w.number(0, w.values[x].dim() - 1)
    n = w.values[x].shape[d]
    return w.one(f"{x}.index_select({d}, ids.flatten() % {n})", f"{x}[ids % {w.values[x].shape[0]}]")


def _constrain(w: _Writer) -> str | None:
    x = w.value()
    n = w.values[x].dim()
    layout = f"Shard({w.number(-n, n - 1)})" if n and w.one(True, True, False) else "Replicate()"
    return f"shardc.constrain({x}, Layout(tp={layout}))"


STEPS = (
    _linear, _linear, _linear, _linear, _norm, _norm, _embedding, _parameter, _shared_weight, _pointwise, _pointwise,
    _pointwise, _binary, _binary, _binary, _matmul, _matmul, _attention, _reduction, _reduction, _softmax, _loss, _swap,
    _swap, _reshape, _reshape, _reshape, _piece, _piece, _join, _lookup, _constrain, _conv, _heads, _tied, _made_weight,
    _ordered, _in_place, _pool,
)  # fmt: skip
