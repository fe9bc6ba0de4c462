"""Functions of torch that look at a value where they need not, in a form that a program can hold.

What torch decides by reading a tensor on the host is of three kinds. A check of an argument becomes an operator that
raises when the program runs (`rules/checks.py`). A choice becomes `torch.where`, and a place becomes a lookup: both
are computed. A size, or an answer, stays what data decides (trace_unbacked.py).
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardc.compiler.errors import ShardingError
from shardc.compiler.rules.checks import CHECK_TRUE
from shardc.compiler.rules.ops.losses.ctc import CTC
from shardc.compiler.rules.ops.lstsq import LSTSQ
from shardc.compiler.trace.sources import sparse

VIEW_HELP = "clone the result of narrow before either is changed in place"


class Rewrites(TorchFunctionMode):
    """Calls the rewritten form of each function that has one, and takes it for these arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._views: list[tuple[Tensor, int]] = []  # copies that stand for views, and what they are views of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rewrite = REWRITES.get(func)
        found = rewrite(*args, **(kwargs or {})) if rewrite else NotImplemented
        if found is NotImplemented:
            if func in MAKE_SPARSE:
                raise sparse(f"{func.__name__} gives", "sparse")
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.layout is not torch.strided:
                raise sparse(f"{getattr(func, '__name__', func)} gives", found.layout)
            return found
        if rewrite is _narrow:
            self._views += [(t, t._version) for t in (args[0] if args else kwargs["input"], found)]
        return found

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and any(t._version != version for t, version in self._views):
            raise ShardingError(
                "forward changes in place a tensor of which narrow gave a view that begins where another tensor says",
                help=VIEW_HELP,
            )


def _check(holds: Tensor, message: str, error: type[Exception] = RuntimeError) -> None:
    CHECK_TRUE(holds.detach(), error.__name__, message)


# ---- checks of an argument


def _gaussian_nll(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Any:
    """Half of log(var) + (input - target)^2 / var, var being at least eps, for which it has no gradient."""
    if not isinstance(var, Tensor) or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    if var.shape != input.shape:
        if var.shape == input.shape[:-1]:
            var = var.unsqueeze(-1)
        elif var.shape != (*input.shape[:-1], 1):
            return NotImplemented
    _check((var >= 0).all(), "var has negative entry/entries", ValueError)
    var = var + (var.clamp(min=eps) - var).detach()
    loss = (var.log() + (input - target) ** 2 / var) / 2 + (math.log(2 * math.pi) / 2 if full else 0)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _weighted(x: Tensor, fweights: Tensor | None, aweights: Tensor | None) -> Tensor | None:
    """The weight of each observation, None where all weigh one."""
    given = [(w, name) for w, name in ((fweights, "fweights"), (aweights, "aweights")) if w is not None]
    for w, name in given:
        if x.shape[1]:
            _check((w >= 0).all(), f"cov(): {name} cannot be negative")
    weights = [w for w, _ in given]
    product = weights[0] * weights[1] if len(weights) == 2 else weights[0] if weights else None
    if product is not None:
        _check(product.sum() != 0, "cov(): weights sum to zero, can't be normalized")
    return product


def _cov(input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Any:
    """Products of the deviations of all pairs of rows, over the degrees of freedom, which are at least zero."""
    weights = [w for w in (fweights, aweights) if w is not None]
    x = input.view(1, -1) if input.dim() < 2 else input
    if input.dim() > 2 or input.dtype is torch.bool or any(w.shape != x.shape[1:] for w in weights):
        return NotImplemented  # torch says what is wrong
    w = _weighted(x, fweights, aweights)
    total = x.shape[1] if w is None else w.sum()
    x = x - ((x if w is None else x * w).sum(1) / total).unsqueeze(1)
    left_out = correction if w is None or aweights is None else correction * (w * aweights).sum() / total
    freedom: Any = total - left_out
    freedom = freedom.clamp(min=0) if isinstance(freedom, Tensor) else max(freedom, 0)
    return (x @ (x if w is None else x * w).mH / freedom).squeeze()


def _corrcoef(input: Tensor) -> Any:
    """Covariances over both deviations; what rounding put beyond one is one.

    That has no part in the gradient, which is zero at one anyway: which elements it happens to is up to rounding.
    """
    c = _cov(input)
    if c is NotImplemented or c.dim() == 0:
        return c if c is NotImplemented else c / c
    deviation = (c.diagonal().real if c.is_complex() else c.diagonal()).sqrt()
    c = c / deviation.unsqueeze(1) / deviation.unsqueeze(0)
    value = c.detach()
    inside = torch.complex(value.real.clip(-1, 1), value.imag.clip(-1, 1)) if c.is_complex() else value.clip(-1, 1)
    return c + (inside - value)


# ---- places


def _narrow(input: Tensor, dim: int, start: Any, length: int) -> Any:
    """`length` rows from where a tensor says."""
    if not isinstance(start, Tensor) or not input.dim():
        return NotImplemented
    size = input.shape[dim]
    _check(
        (start >= -size) & (torch.where(start < 0, start + size, start) + length <= size),
        f"narrow: {length} rows from start exceed dimension size ({size})",
    )
    start = torch.where(start < 0, start + size, start)
    return input.index_select(dim, start + torch.arange(length, device=input.device))


def _combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Any:
    """Which elements go together depends on how many there are, not on what they are."""
    if input.dim() != 1 or r < 1:
        return NotImplemented
    pick = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    chosen = list(pick(range(input.shape[0]), r))
    index = torch.tensor(chosen, dtype=torch.int64, device=input.device).reshape(len(chosen), r)
    return input[index]


# ---- choices


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Any:
    """Backward of the value would look at which numbers of the index are equal."""
    if not isinstance(value, Tensor) or not value.requires_grad or not input.dim():
        return NotImplemented
    hit = torch.zeros(input.shape[dim], dtype=torch.bool, device=input.device).index_fill(0, index, True)
    shape = [1] * input.dim()
    shape[dim] = input.shape[dim]
    return torch.where(hit.view(shape), value, input)


def _put(x: Tensor, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    """Values put where a mask says, the n-th at the n-th place; backward would count the places."""
    mask = indices[0] if len(indices) == 1 else None
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or not getattr(values, "requires_grad", False):
        return NotImplemented
    rest = x.dim() - mask.dim()
    if values.dim() == rest + 1 and isinstance(values.shape[0], torch.SymInt):
        return NotImplemented  # as many as data says: so are the places
    listed = values.dim() == rest + 1
    if values.dim() > rest + 1 or (listed and not values.shape[0]) or mask.shape != x.shape[: mask.dim()]:
        return NotImplemented
    if listed and values.shape[0] > 1:
        count = values.shape[0]
        _check(mask.sum() == count, f"shape mismatch: {count} values for another number of places")
        place = mask.flatten().cumsum(0).sub(1).clamp(0, count - 1)
        values = values[place.reshape(mask.shape)]
    elif listed:
        values = values.squeeze(0)
    return torch.where(mask.reshape(*mask.shape, *[1] * rest), x + values if accumulate else values, x)


def _set(x: Tensor, index: Any, values: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    found = _put(x, index, values.to(x.dtype) if isinstance(values, Tensor) else values)
    if found is NotImplemented:
        return NotImplemented
    x.copy_(found)
    return None


def _in_place(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    def written(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = rewrite(x, *args, **kwargs)
        return found if found is NotImplemented else x.copy_(found)

    return written


# ---- answers that data gives: where the module can be traced no other way, numbers of the program


def _equal(input: Tensor, other: Tensor) -> Any:
    """Whether two tensors are of one shape and hold the same."""
    if input.dtype != other.dtype or input.device != other.device:
        return NotImplemented  # torch says what is wrong
    return input.shape == other.shape and (input == other).all().item()


def _allclose(input: Tensor, other: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> Any:
    return torch.isclose(input, other, rtol, atol, equal_nan).all().item()


def _one_hot(input: Tensor, num_classes: int = -1) -> Any:
    """As many classes as the largest number says."""
    if num_classes != -1 or not input.numel() or input.dtype is not torch.int64:
        return NotImplemented
    _check((input >= 0).all(), "Class values must be non-negative.")
    classes: Any = input.max().item() + 1
    return (input.unsqueeze(-1) == torch.arange(classes, device=input.device)).to(torch.int64)


# ---- operators without a form for tracing


def _ctc(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: Any = "mean",
    zero_infinity: bool = False,
) -> Any:
    """One loss per text; the mean is of the losses per symbol."""
    given = (input_lengths, target_lengths)
    device = targets.device
    lengths = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int64, device=device) for x in given]
    kind = reduction if isinstance(reduction, str) else ("none", "mean", "sum")[reduction]
    if log_probs.dim() not in (2, 3) or kind not in ("none", "mean", "sum"):
        return NotImplemented
    single = log_probs.dim() == 2
    if single:
        log_probs, targets = log_probs.unsqueeze(1), targets.unsqueeze(0)
        lengths = [x.reshape(1) for x in lengths]
    loss = CTC(log_probs, targets, *lengths, blank, zero_infinity)
    if kind == "mean":
        return (loss / lengths[1].clamp(min=1).to(loss.dtype)).mean()
    return loss.sum() if kind == "sum" else loss.squeeze(0) if single else loss


def _lstsq(input: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """Of one batch; b may be a vector for each matrix."""
    vector = b.dim() == 1 or (b.dim() == input.dim() - 1 and b.shape == input.shape[:-1])
    columns = b.unsqueeze(-1) if vector else b
    if input.dim() < 2 or not input.numel() or columns.shape[:-1] != input.shape[:-1] or input.device.type != "cpu":
        return NotImplemented
    if not columns.numel() or input.dtype != b.dtype or driver not in (None, "gels", "gelsy", "gelsd", "gelss"):
        return NotImplemented
    solution, *rest = LSTSQ(input, columns, rcond, driver)
    form: Any = vars(torch.return_types)["linalg_lstsq"]
    return form((solution.squeeze(-1) if vector else solution, *rest))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """With a dense gradient, which holds the same numbers."""
    if not sparse:
        return NotImplemented
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _embedding_bag(*args: Any, **kwargs: Any) -> Any:
    """The same of bags."""
    given = BAG.bind(*args, **kwargs).arguments
    return F.embedding_bag(**{**given, "sparse": False}) if given.get("sparse") else NotImplemented


# ---- functions that torch 2.13 traces as something else than it computes


def _multilabel_margin(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    """Of each row the classes before the first -1 against those that are not among them. torch's own form for tracing
    counts a class for each place behind the -1 as well."""
    known = size_average is None and reduce is None and reduction in ("none", "mean", "sum")
    if not known or input.dim() not in (1, 2) or input.shape != target.shape or not input.shape[-1]:
        return NotImplemented  # torch says what is wrong
    classes = input.shape[-1]
    _check((target >= -1).all() & (target < classes).all(), "multilabel_margin_loss: target is out of range")
    listed = (target != -1).cumprod(-1).bool()
    index = torch.where(listed, target, 0)
    among = (listed.unsqueeze(-1) & (index.unsqueeze(-1) == torch.arange(classes, device=target.device))).any(-2)
    loss = F.relu(1 - input.gather(-1, index).unsqueeze(-1) + input.unsqueeze(-2))
    loss = torch.where(listed.unsqueeze(-1) & ~among.unsqueeze(-2), loss, 0).sum((-2, -1)) / classes
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _multi_margin(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of one row without a batch. torch's own form for tracing leaves a dim of size 1 on its loss."""
    if input.dim() != 1 or target.dim() != 0:
        return NotImplemented
    loss = F.multi_margin_loss(input.unsqueeze(0), target.unsqueeze(0), *args, **kwargs)
    return loss.squeeze(0) if loss.dim() else loss


def _set_data(x: Tensor, other: Tensor) -> None:
    """`x.data = other`, of which nothing is recorded, as what is."""
    with torch.no_grad():
        x.set_(other)  # pyright: ignore[reportArgumentType]


# Some of them end the process where they are traced.
KINDS_OF_SPARSE = ("coo", "csr", "csc", "bsr", "bsc")
MAKE_SPARSE = {Tensor.to_sparse, Tensor.to_sparse_coo, Tensor.to_mkldnn, torch.sparse_compressed_tensor}
MAKE_SPARSE |= {getattr(torch, f"sparse_{kind}_tensor") for kind in KINDS_OF_SPARSE}
MAKE_SPARSE |= {getattr(Tensor, f"to_sparse_{kind}") for kind in KINDS_OF_SPARSE}
BAG = inspect.signature(F.embedding_bag)
REWRITES: dict[Any, Callable[..., Any]] = {
    F.gaussian_nll_loss: _gaussian_nll,
    **dict.fromkeys((torch.cov, Tensor.cov), _cov),
    **dict.fromkeys((torch.corrcoef, Tensor.corrcoef), _corrcoef),
    **dict.fromkeys((torch.narrow, Tensor.narrow), _narrow),
    torch.combinations: _combinations,
    **dict.fromkeys((torch.index_fill, Tensor.index_fill), _index_fill),
    Tensor.index_fill_: _in_place(_index_fill),
    **dict.fromkeys((torch.index_put, Tensor.index_put), _put),
    **dict.fromkeys((torch.index_put_, Tensor.index_put_), _in_place(_put)),
    Tensor.__setitem__: _set,
    Tensor.data.__set__: _set_data,  # pyright: ignore[reportAttributeAccessIssue]
    **dict.fromkeys((F.ctc_loss, torch.ctc_loss), _ctc),
    torch.linalg.lstsq: _lstsq,
    **dict.fromkeys((torch.equal, Tensor.equal), _equal),
    **dict.fromkeys((torch.allclose, Tensor.allclose), _allclose),
    F.one_hot: _one_hot,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.multi_margin_loss: _multi_margin,
    F.multilabel_margin_loss: _multilabel_margin,
}
