"""Connectionist temporal classification: the loss of every text of a batch, each computed by itself.

torch's own operator also returns a table as long as the longest text, whose size only the lengths tell; this one
keeps it inside, and its backward computes it anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardc.compiler.rules.table import OpRule, parse, rule

aten = torch.ops.aten


@torch.library.custom_op("shardc::ctc_loss", mutates_args=())
def ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    """(steps, texts, symbols), (texts, longest) or the texts end to end, (texts), (texts) -> (texts)."""
    if not log_probs.shape[1]:
        return log_probs.new_zeros(0)
    loss = aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
    return torch.where(loss == float("inf"), 0, loss) if zero_infinity else loss


@torch.library.custom_op("shardc::ctc_loss_backward", mutates_args=())
def ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    if not log_probs.shape[1]:
        return torch.zeros_like(log_probs)
    call = (log_probs, targets, input_lengths, target_lengths)
    loss, table = aten._ctc_loss.Tensor(*call, blank, zero_infinity)
    return aten._ctc_loss_backward.Tensor(grad.contiguous(), *call, loss, table, blank, zero_infinity)


@ctc_loss.register_fake
def _(log_probs: Tensor, *_: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape[1])


@ctc_loss_backward.register_fake
def _(grad: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _gradients(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.shardc.ctc_loss_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 5


ctc_loss.register_autograd(_gradients, setup_context=_setup)
CTC = torch.ops.shardc.ctc_loss.default
CTC_BACKWARD = torch.ops.shardc.ctc_loss_backward.default


def _operands(targets: Any) -> tuple[str, str]:
    """Texts end to end cannot be dealt out: where one begins, the lengths of all before it say."""
    return ("t n c, n s, n, n", "t c s") if targets.dim() == 2 else ("t n c, s, n, n", "t n c s")


@rule(CTC)
def _(log_probs: Any, targets: Any, *_: Any, results: Any) -> OpRule:
    operands, whole = _operands(targets)
    return parse(f"{operands} -> n", whole=whole)


@rule(CTC_BACKWARD)
def _(grad: Any, log_probs: Any, targets: Any, *_: Any, results: Any) -> OpRule:
    operands, whole = _operands(targets)
    return parse(f"n, {operands} -> t n c", whole=whole, linear="0")
