"""Pointwise operators: every dim is free, operands are broadcast against the result.

What differs between them is through which operands a pending sum may pass, so the table is by that.
"""

from __future__ import annotations

from typing import Any

import torch

from shardc.compiler.rules.notation import broadcast, dims, line
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

# linear= -> operators; a name without an overload is the default one.
# add and its like pass a sum that both operands hold: (a0 + a1) + b counted on each rank would add b twice.
# A backward is linear in the gradient and in nothing else.
POINTWISE = {
    "0": """
        alias clone detach lift lift_fresh lift_fresh_copy positive _lazy_clone
        neg _neg_view _conj _conj_physical conj_physical deg2rad rad2deg
        mul.Scalar div.Tensor div.Scalar true_divide.Tensor ldexp.Tensor
        sigmoid_backward tanh_backward logit_backward silu_backward mish_backward gelu_backward elu_backward
        threshold_backward leaky_relu_backward hardtanh_backward hardswish_backward hardsigmoid_backward
        hardshrink_backward softshrink_backward softplus_backward
        _prelu_kernel_backward zero
    """,
    "0 | 1": "mul.Tensor",
    "0 1": "add.Tensor sub.Tensor rsub.Tensor lerp.Scalar lerp.Tensor complex addcdiv",
    "0 1 | 0 2": "addcmul",
    "1 2": "where.self",
    "1": "copy fill.Tensor",
    "": """
        abs acos acosh angle asin asinh atan atanh atan2 ceil cos cosh digamma erf erfc erfinv exp exp2 expm1
        floor frac i0 lgamma log log10 log1p log2 logit mvlgamma nan_to_num polygamma reciprocal
        round round.decimals rsqrt sgn sign sin sinc sinh sqrt square tan tanh trunc
        isfinite isinf isnan isneginf isposinf signbit logical_not bitwise_not
        celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu sigmoid silu
        softplus softshrink threshold _prelu_kernel
        add.Scalar sub.Scalar rsub.Scalar fill.Scalar
        clamp clamp.Tensor clamp_max clamp_max.Tensor clamp_min clamp_min.Tensor clip clip.Tensor
        pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar
        float_power.Tensor_Tensor float_power.Tensor_Scalar float_power.Scalar
        fmod.Tensor fmod.Scalar remainder.Tensor remainder.Scalar remainder.Scalar_Tensor
        floor_divide floor_divide.Scalar copysign.Tensor copysign.Scalar
        max.other min.other maximum minimum fmax fmin hypot heaviside nextafter gcd lcm polar
        logaddexp logaddexp2 igamma igammac xlogy.Tensor xlogy.Scalar_Self xlogy.Scalar_Other frexp.Tensor
        eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor
        eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar
        logical_and logical_or logical_xor
        bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor
        bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar
        bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor
        bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_left_shift.Scalar_Tensor
        bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_right_shift.Scalar_Tensor
        __xor__.Tensor __xor__.Scalar __lshift__.Tensor __lshift__.Scalar __rshift__.Tensor __rshift__.Scalar
        special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
        special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri
        special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
        special_modified_bessel_k1 special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
        special_spherical_bessel_j0
        special_xlog1py special_xlog1py.other_scalar special_xlog1py.self_scalar
        special_zeta special_zeta.other_scalar special_zeta.self_scalar
    """,
}
POLYNOMIALS = [
    *(f"chebyshev_polynomial_{k}" for k in "tuvw"),
    *(f"shifted_chebyshev_polynomial_{k}" for k in "tuvw"),
    "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p",
]  # fmt: skip


def pointwise(*args: Any, results: Any, linear: str = "", **kwargs: Any) -> OpRule:
    """The rule of one pointwise call: `..., ... -> ...`, or with names where an operand is stretched."""
    shape = results[0].shape
    operands = [t.shape for t in tensors_in(args, kwargs)]
    names = dims(len(shape))
    lists = [broadcast(s, shape, names) for s in operands]
    if any("1" in dims for dims in lists):
        return parse(line(lists, [names] * len(results)), linear=linear)
    return parse(line([["..."]] * len(lists), [["..."]] * len(results)), linear=linear)


def named(word: str) -> Any:
    """`mul.Tensor` or `relu` as an operator."""
    packet, _, overload = word.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _register(word: str, linear: str) -> None:
    def build(*args: Any, **kwargs: Any) -> OpRule:
        return pointwise(*args, linear=linear, **kwargs)

    rule(named(word))(build)


for _linear, _words in POINTWISE.items():
    for _word in _words.split():
        _register(_word, _linear)
for _name in POLYNOMIALS:
    for _overload in ("default", "x_scalar", "n_scalar"):
        _register(f"special_{_name}.{_overload}", "")


@rule(aten._to_copy.default)
def _(*args: Any, results: Any, **kwargs: Any) -> OpRule:
    """A cast is linear unless it cuts fractions off."""
    kept = results[0].dtype.is_floating_point or results[0].dtype.is_complex
    return pointwise(*args, results=results, linear="0" if kept else "")


@rule(aten.div.Tensor_mode)
@rule(aten.div.Scalar_mode)
def _(*args: Any, results: Any, rounding_mode: str | None = None) -> OpRule:
    return pointwise(*args, results=results, linear="" if rounding_mode else "0")


@rule(aten.masked_fill.Scalar)
def _(x: Any, mask: Any, value: Any, *, results: Any) -> OpRule:
    return pointwise(x, mask, results=results, linear="" if value else "0")


@rule(aten.masked_fill.Tensor)
def _(x: Any, mask: Any, value: Any, *, results: Any) -> OpRule:
    return pointwise(x, mask, value, results=results, linear="0 2")


# The buffer that log_sigmoid keeps for its backward is as large as the input or, on some devices, empty.
@rule(aten.log_sigmoid_forward.default)
def _(x: Any, *, results: Any) -> OpRule:
    if results[1].shape == x.shape:
        return parse("... -> ..., ...")
    return parse("... -> ..., empty", whole="empty")


@rule(aten.log_sigmoid_backward.default)
def _(grad: Any, x: Any, buffer: Any, *, results: Any) -> OpRule:
    if buffer.shape == x.shape:
        return parse("..., ..., ... -> ...", linear="0")
    return parse("..., ..., empty -> ...", whole="empty", linear="0")


# dim holds two halves, values before gates, and each half may be split alike
@rule(aten.glu.default)
def _(x: Any, dim: int = -1, *, results: Any) -> OpRule:
    return parse(line([dims(x.dim(), {dim: "(c n)"})], [dims(x.dim(), {dim: "n"})]), whole="c")


@rule(aten.glu_backward.default)
def _(grad: Any, x: Any, dim: int, *, results: Any) -> OpRule:
    full = dims(x.dim(), {dim: "(c n)"})
    return parse(line([dims(x.dim(), {dim: "n"}), full], [full]), whole="c", linear="0")


rule(aten.view_as_real.default, "... -> ... c", whole="c", linear="0")
rule(aten.view_as_complex.default, "... c -> ...", whole="c", linear="0")
