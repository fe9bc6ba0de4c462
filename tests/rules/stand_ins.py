"""CPU kernels, in plain arithmetic, of operators that only accelerators run: their rules are proved on these.

Importing this registers them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._decomp import global_decomposition_table

aten = torch.ops.aten


def scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    out = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1])) + (0 if bias is None else bias)
    later = torch.ones(out.shape[-2:], dtype=torch.bool).tril().logical_not()
    return out.masked_fill(later, -math.inf) if causal else out


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp of the scores); a key head serves as many query heads as there are for each."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = scores(q, k, bias, causal, scale)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> list[Tensor | None]:
    groups, scale = k.shape[1], scale or 1 / math.sqrt(q.shape[-1])
    k, v = (t.repeat_interleave(q.shape[1] // groups, 1) for t in (k, v))
    p = scores(q, k, bias, causal, scale).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = (t.unflatten(1, (groups, -1)).sum(2) for t in (ds.mT @ q * scale, p.mT @ grad))
    return [ds @ k * scale, dk, dv, None if bias is None else ds.sum_to_size(bias.shape)]


def seeds() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    seed, unused = seeds()
    out, lse = attention(q, k, v, None, is_causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], seed, unused, q.new_empty(0)


def flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    return tuple(gradients(grad, q, k, v, None, is_causal, scale)[:3])


def efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    out, lse = attention(q, k, v, attn_bias, is_causal, scale)
    rows = -(-q.shape[2] // 32) * 32 if compute_log_sumexp else 0
    padded = lse.new_zeros(*lse.shape[:2], rows)
    padded[:, :, : lse.shape[2]] = lse[:, :, :rows]
    return out, padded, *seeds()


def efficient_backward(
    grad, q, k, v, bias, out, lse, seed, offset, dropout_p, grad_input_mask, is_causal=False, *, scale=None
):
    found = gradients(grad, q, k, v, bias, is_causal, scale)
    return tuple(t if wanted else None for t, wanted in zip(found, grad_input_mask, strict=True))


def cudnn(
    q,
    k,
    v,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    out, lse = attention(q, k, v, attn_bias, is_causal, scale)
    return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], *seeds(), q.new_empty(0)


def cudnn_backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    seed,
    offset,
    bias,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    return tuple(gradients(grad, q, k, v, bias, is_causal, scale)[:3])


def batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    out = aten.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return *out, torch.zeros(7, dtype=torch.uint8)


def batch_norm_backward(x, grad, weight, running_mean, running_var, mean, rstd, eps, reserve):
    return aten.native_batch_norm_backward(
        grad, x, weight, running_mean, running_var, mean, rstd, True, eps, [True, True, True]
    )


CPU = torch.library.Library("aten", "IMPL", "CPU")
for name, kernel in {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "cudnn_batch_norm": batch_norm,
    "cudnn_batch_norm_backward": batch_norm_backward,
    "_fused_rms_norm_backward": global_decomposition_table["post_autograd"][aten._fused_rms_norm_backward.default],
}.items():
    CPU.impl(name, kernel)
