"""One sample of one operator: what plain torch makes of it, and what shardc and DTensor make of it when sharded."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import shardc
from shardc import PlanError, ShardingError
from shardc.compiler.ir.graph import copy_graph
from shardc.compiler.ir.signature import Traced
from shardc.compiler.trace.trace import trace

RANKS = 4
FAULT = "fault of the compiler"  # what an error says that is no refusal
Layout = tuple[Placement, ...]


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a sample's arguments."""

    index: int


class Applied(nn.Module):
    """A module that does nothing but one operator, with a sample's other arguments."""

    def __init__(self, op: Callable[..., Any], args: Any) -> None:
        super().__init__()
        self.op, self.args = op, args

    def forward(self, *tensors: Tensor) -> Any:
        args, kwargs = _filled(self.args, tensors)
        return self.op(*args, **kwargs)


def _filled(tree: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(tree, Slot):
        return tensors[tree.index]
    if type(tree) in (list, tuple):
        return type(tree)([_filled(t, tensors) for t in tree])
    if type(tree) is dict:
        return {k: _filled(t, tensors) for k, t in tree.items()}
    return tree


@dataclass(frozen=True)
class Result:
    """What a call gave: its tensors and other values in order, and the gradient of each input (or None)."""

    outputs: list[Any]
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """One sample of one operator, and what plain torch makes of it."""

    op: Callable[..., Any]
    args: Any
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, op: Any, sample: Any) -> "Case":
        tensors: list[Tensor] = []

        def slot(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            tensors.append(x)
            return Slot(len(tensors) - 1)

        args = pytree.tree_map(slot, ((sample.input, *sample.args), dict(sample.kwargs)))
        return cls(op.op, args, tuple(tensors))

    def fresh(self, grad: bool) -> list[Tensor]:
        return [x.detach().clone().requires_grad_(grad and x.requires_grad) for x in self.tensors]

    def alone(self, grad: bool) -> Result:
        given = self.fresh(grad)
        with torch.set_grad_enabled(grad):
            return finish(Applied(self.op, self.args)(*given), given)

    def exact(self, grad: bool) -> Result | None:
        """What plain torch makes of the same numbers in twice the precision; None where it does not."""
        wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
        tensors = [x.detach().to(wide.get(x.dtype, x.dtype)).requires_grad_(x.requires_grad) for x in self.tensors]
        try:
            return Case(self.op, self.args, tuple(tensors)).alone(grad)
        except (RuntimeError, TypeError, ValueError):  # an operator of one precision, or of two that must agree
            return None


def finish(value: Any, given: Sequence[Tensor]) -> Result:
    """The leaves of a result, after a backward with fixed numbers into every input that requires grad."""
    leaves = pytree.tree_leaves(value)
    ends = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if ends:
        torch.autograd.backward(ends, [_tangent(t, 1000 * i) for i, t in enumerate(ends)])
    outputs = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
    return Result(outputs, [x.grad for x in given])


# Drawn here: where torch simulates ranks each would draw numbers of its own.
NOISE = torch.randn(2**16, generator=torch.Generator().manual_seed(1)).double()  # the same in any precision


def _tangent(x: Tensor, start: int) -> Tensor:
    """Fixed numbers for a result's gradient."""
    width = 2 if x.is_complex() else 1
    flat = NOISE.roll(-start)[torch.arange(width * x.numel()) % NOISE.numel()]
    flat = torch.view_as_complex(flat.view(-1, 2)) if x.is_complex() else flat
    return flat.view(x.shape).to(x.dtype)


# ---- which layouts


def layouts(case: Case, most: int, even: bool, name: str) -> list[Layout]:
    """Every combination of Replicate and Shard(d) over the tensor arguments; of many, a fixed few."""
    choices: list[list[Placement]] = []
    for x in case.tensors:
        dims = [d for d in range(x.dim()) if x.shape[d] and (not even or x.shape[d] % RANKS == 0)]
        choices.append([Replicate(), *map(Shard, dims)])
    count = 1
    for choice in choices:
        count *= len(choice)
    if count <= most + 1:
        return list(itertools.product(*choices))[1:] or [tuple(Replicate() for _ in choices)]
    whole = [choice[0] for choice in choices]
    single = [(*whole[:i], p, *whole[i + 1 :]) for i, choice in enumerate(choices) for p in choice[1:]]
    ends = [tuple(choice[at] for choice in choices) for at in (-1, min(1, min(map(len, choices)) - 1))]
    random = Random(name)
    drawn = [tuple(random.choice(choice) for choice in choices) for _ in range(4 * most)]
    random.shuffle(single)
    order = [*single[: most - 2], *ends, *drawn]
    return [layout for layout in dict.fromkeys(order) if any(p != Replicate() for p in layout)][:most]


# ---- the contenders


def by_shardc(case: Case, grad: bool) -> Callable[[Layout], Result]:
    """Compiles the operator for a layout and runs it; traced once for all of them."""
    found: list[Traced] = []

    def once(module: nn.Module, *args: Any, **options: Any) -> Traced:
        if not found:
            found.append(trace(module, *args, **options))
        return Traced(copy_graph(found[0].gm), found[0].signature)

    def run(layout: Layout) -> Result:
        given = case.fresh(grad)
        with torch.set_grad_enabled(grad):
            mesh = shardc.Mesh(tp=RANKS)
            compiled = shardc.compile(Applied(case.op, case.args), shardc.Plan(tp={}), mesh=mesh, inputs=layout)
            compiled._bound.lowering.tracing.trace = once
            return finish(compiled(*given), given)

    return run


def by_dtensor(case: Case, grad: bool) -> Callable[[Layout], Result]:
    """Calls the operator on DTensors of ranks simulated by torch's own LocalTensorMode."""
    import torch.distributed as dist
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())

    def gathered(x: Any) -> Any:
        x = x.full_tensor() if isinstance(x, DTensor) else x
        return x.reconcile() if isinstance(x, LocalTensor) else x

    def run(layout: Layout) -> Result:
        given = case.fresh(False)
        with LocalTensorMode(RANKS), torch.set_grad_enabled(grad):
            mesh = init_device_mesh("cpu", (RANKS,))
            pieces = [distribute_tensor(x, mesh, [p], src_data_rank=None) for x, p in zip(given, layout, strict=True)]
            pieces = [x.requires_grad_(grad and y.requires_grad) for x, y in zip(pieces, case.tensors, strict=True)]
            value = pytree.tree_map_only(DTensor, lambda x: x.full_tensor(), Applied(case.op, case.args)(*pieces))
            result = finish(value, pieces)
            return Result([gathered(x) for x in result.outputs], [gathered(g) for g in result.gradients])

    return run


CONTENDERS = {"shardc": by_shardc, "dtensor": by_dtensor}


# ---- comparing


def difference(have: Any, want: Any) -> str:
    """In which way two results differ beyond rounding, or nothing."""
    if not isinstance(want, Tensor) or not isinstance(have, Tensor):
        same = have is None and want is None or (have == want and isinstance(have, Tensor) == isinstance(want, Tensor))
        return "" if same else f"{_brief(have)} instead of {_brief(want)}"
    if have.shape != want.shape or have.dtype != want.dtype:
        return f"{_brief(have)} instead of {_brief(want)}"
    if not want.numel():
        return ""
    if not want.is_floating_point() and not want.is_complex():
        return "" if torch.equal(have, want) else "other integers"
    finite = want.detach().abs().nan_to_num(0, 0, 0)
    close = 2e-4 * max(1.0, finite.max().item()) if want.dtype in (torch.float32, torch.complex64) else 1e-9
    if torch.allclose(have, want, rtol=1e-4, atol=close, equal_nan=True):
        return ""
    return f"off by {(have - want).abs().nan_to_num(float('inf'), float('inf')).max().item():.3g}"


def _brief(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)[:60]


def compared(have: Result, want: Result) -> str:
    if len(have.outputs) != len(want.outputs):
        return f"{len(have.outputs)} outputs instead of {len(want.outputs)}"
    for i, pair in enumerate(zip(have.outputs, want.outputs, strict=True)):
        if text := difference(*pair):
            return f"output {i}: {text}"
    for i, pair in enumerate(zip(have.gradients, want.gradients, strict=True)):
        if text := difference(*pair):
            return f"gradient {i}: {text}"
    return ""


def as_exact(have: Result, want: Result, exact: Result | None) -> bool:
    """Whether all that differs does so by rounding: of the numbers in float64, what was found is off by no more than
    twice as much as plain torch."""
    if exact is None:
        return False
    found, alone, true = ([*r.outputs, *r.gradients] for r in (have, want, exact))
    if not len(found) == len(alone) == len(true):
        return False
    off = [(x, y, z) for x, y, z in zip(found, alone, true, strict=True) if difference(x, y)]
    return all(_error(x, z) <= 2 * _error(y, z) < float("inf") for x, y, z in off)


def _error(found: Any, true: Any) -> float:
    """The largest distance of an element; infinite for what cannot be compared."""
    if not isinstance(found, Tensor) or not isinstance(true, Tensor) or found.shape != true.shape:
        return float("inf")
    if not (found.is_floating_point() or found.is_complex()):
        return float("inf")
    found = found.to(true.dtype)
    same = (found == true) | (found.isnan() & true.isnan())
    return torch.where(same, 0, found - true).abs().nan_to_num(float("inf")).max().item()


def judged(
    run: Callable[[Layout], Result], layout: Layout, want: Result, exact: Callable[[], Result | None]
) -> tuple[str, str]:
    """(right, refused, error or wrong; the message, of what is right only where it took `exact` to tell)."""
    try:
        have = run(layout)
        text = compared(have, want)
    except (PlanError, ShardingError) as error:
        what = f"{error.what}; {error.help}" if FAULT not in str(error) else str(error)
        return ("error" if FAULT in str(error) else "refused"), what
    except Exception as error:
        kind = "refused" if isinstance(error, NotImplementedError) else "error"
        return kind, f"{type(error).__name__}: {str(error)[:300]}"
    return ("wrong" if text and not as_exact(have, want, exact()) else "right"), text
