"""Least squares: every matrix of a batch by itself. torch's own operator has no form for tracing; this one has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardc.compiler.rules.notation import line
from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten
SINGULAR = ("gelsd", "gelss")  # drivers that give singular values


@torch.library.custom_op("shardc::lstsq", mutates_args=())
def lstsq(a: Tensor, b: Tensor, rcond: float | None, driver: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(..., m, n), (..., m, k) -> solution (..., n, k), residuals (..., k), rank (...), singular values (..., min);
    of the last three those that the driver does not give have the shape (0). Raises RuntimeError where a matrix has
    not full rank and there are residuals if all have."""
    found = [x.clone() for x in aten.linalg_lstsq.default(a, b, rcond, driver=driver)]
    if found[1].shape != _shapes(a, b, driver)[1]:
        raise RuntimeError(f"linalg.lstsq: a matrix has not full rank, and driver {driver!r} gives no residuals then")
    return found[0], found[1], found[2], found[3]


def _shapes(a: Tensor, b: Tensor, driver: str | None) -> list[tuple[int, ...]]:
    *batch, m, n = a.shape
    k, none = b.shape[-1], (0,)
    residuals = (*batch, k) if m > n and driver in ("gels", *SINGULAR) else none
    rank = none if driver == "gels" else (*batch,)
    return [(*batch, n, k), residuals, rank, (*batch, min(m, n)) if driver in SINGULAR else none]


@lstsq.register_fake
def _(a: Tensor, b: Tensor, rcond: float | None, driver: str | None) -> Any:
    solution, residuals, rank, values = _shapes(a, b, driver)
    real = a.dtype.to_real()
    return (
        a.new_empty(solution), a.new_empty(residuals, dtype=real), a.new_empty(rank, dtype=torch.int64),
        a.new_empty(values, dtype=real),
    )  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    a, b, ctx.rcond, _ = inputs
    ctx.save_for_backward(a, b, output[0])
    ctx.mark_non_differentiable(*output[2:])
    ctx.residuals = output[1].shape[-1:] != (0,)


def _gradients(ctx: Any, grad: Tensor | None, of_residuals: Tensor | None, *_: Any) -> Any:
    """Of x = pinv(a) b, and of the residuals |a x - b|^2."""
    a, b, x = ctx.saved_tensors
    grad = torch.zeros_like(x) if grad is None else grad
    whole = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device).expand(*a.shape[:-1], a.shape[-2])
    inverse, off = LSTSQ(a, whole, ctx.rcond, "gelsy")[0], b - a @ x
    of_b = inverse.mH @ grad
    of_a = off @ (inverse @ of_b).mH + inverse.mH @ x @ (grad - a.mH @ of_b).mH - of_b @ x.mH
    if ctx.residuals and of_residuals is not None:
        of_off = 2 * off * of_residuals.unsqueeze(-2)
        of_a, of_b = of_a - of_off @ x.mH, of_b + of_off
    return of_a, of_b, None, None


lstsq.register_autograd(_gradients, setup_context=_setup)
LSTSQ = torch.ops.shardc.lstsq.default


@rule(LSTSQ)
def _(a: Any, b: Any, rcond: Any, driver: Any, *, results: Any) -> OpRule:
    """The batch is whole where residuals may be missing: every rank must raise, or none."""
    batch = [f"d{i}" for i in range(a.dim() - 2)]
    ends = [["n", "k"], ["k"], [], ["s"]]
    made = [
        [*batch, *end] if t.dim() != 1 or t.shape[0] else [f"e{i}"]
        for i, (t, end) in enumerate(zip(results, ends, strict=True))
    ]
    whole = ["m", "n", "k", *(name for names in made for name in names if name[0] in "se")]
    text = line([[*batch, "m", "n"], [*batch, "m", "k"]], made)
    if driver in SINGULAR and results[1].dim() == a.dim() - 1:
        whole, batch = [*whole, *batch], []
    # an empty result is complete without any of the batch
    return parse(text, whole=" ".join(whole), joined=" ".join(batch))
