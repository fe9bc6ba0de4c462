"""Calls that prove the rules of pointwise operators, most of them made up from the operators' schemas."""

from __future__ import annotations

import math

import torch

from shardc.compiler.rules.ops.pointwise import POINTWISE, POLYNOMIALS, named
from tests.rules.operands import F64, Case, case, mask, real, whole

aten = torch.ops.aten

ONE_SHAPE = [[(7, 5)] * 3, [(1, 3)] * 3, [()] * 3]
STRETCHED = [[(3, 5), (5,), (3, 1)], [(2, 7, 1), (7, 3), (3,)], [(2, 3), (), (1, 1)]]
INTEGERS = ("bitwise", "__", "gcd", "lcm")
FILLERS = {"number": 0.5, "float": 0.25, "int": 2, "bool": False}
APART = {"where.self", "fill.Tensor", "_conj", "_conj_physical", "conj_physical", "acosh"} | {
    "silu_backward",
    "copy",
    "clamp",
    "clip",
}


def _made_up(word: str, shapes: list[tuple[int, ...]], low: float) -> Case:
    op, args, tensors, kwargs = named(word), [], iter(shapes), {}
    integers = word.startswith(INTEGERS)
    for arg in op._schema.arguments:
        kind = str(arg.type).removeprefix("Optional[").removesuffix("]")
        if kind == "Tensor":
            shape = next(tensors)
            value = whole(7, *shape) + 1 if integers else real(*shape, low=low, high=low + 1)
        elif arg.has_default_value() or kind not in FILLERS:
            continue
        else:
            value = 2 if integers else FILLERS[kind]
        if arg.kwarg_only:
            kwargs[arg.name] = value
        else:
            args.append(value)
    return op, tuple(args), kwargs


def _pointwise() -> list[Case]:
    words = [w for group in POINTWISE.values() for w in group.split() if w not in APART]
    out = []
    for i, word in enumerate(words):
        tensors = sum("Tensor" in str(a.type) for a in named(word)._schema.arguments)
        out += [_made_up(word, ONE_SHAPE[0], 0.0), _made_up(word, ONE_SHAPE[1 + i % 2], 1.0)]
        if tensors > 1 and "backward" not in word:
            out += [_made_up(word, STRETCHED[i % 3], 0.0)]
    for name in POLYNOMIALS:
        x, n = real(3, 5, low=0, high=1), torch.tensor([2.0, 1.0, 3.0, 0.0, 4.0], dtype=F64)
        op = getattr(aten, f"special_{name}")
        out += [case(op.default, x, n), case(op.x_scalar, 0.5, n), case(op.n_scalar, x, 3)]
    return out


def _pointwise_by_hand() -> list[Case]:
    x, y, g = real(3, 5), real(3, 5, low=0, high=1), real(3, 5, low=-1, high=3)
    out = [case(aten.where.self, mask(3, 5), x, y), case(aten.where.self, mask(3, 1), real(5), real(1, 1))]
    out += [
        case(aten.fill.Tensor, x, real()),
        case(aten.acosh.default, real(3, 5, low=1)),
        case(aten.neg.default, x),
    ]
    out += [case(op.default, torch.complex(x, y)) for op in (aten._conj, aten._conj_physical, aten.conj_physical)]
    out += [case(aten._to_copy.default, x, dtype=t) for t in (torch.complex128, torch.int64, torch.bool, F64)]
    out += [
        case(aten._to_copy.default, x.int(), dtype=F64),
        case(aten.view_as_real.default, torch.complex(x, y)),
    ]
    out += [case(aten.view_as_complex.default, real(5, 3, 2)), case(aten.mul.Tensor, torch.complex(x, y), x)]
    for mode in (None, "floor", "trunc"):
        out += [case(aten.div.Tensor_mode, x, y[:1], rounding_mode=mode)]
        out += [case(aten.div.Scalar_mode, x, 0.7, rounding_mode=mode)]
    out += [case(aten.masked_fill.Scalar, x, mask(5), v) for v in (0, -math.inf, 2.5)]
    out += [case(aten.masked_fill.Tensor, x, mask(3, 1), real())]
    out += [case(aten.add.Tensor, x, y, alpha=3), case(aten.sub.Tensor, x, whole(9, 5), alpha=-0.5)]
    out += [case(aten.rsub.Tensor, x, y, alpha=2), case(aten.addcmul.default, x, y, g, value=-2)]
    out += [case(aten.mul.Tensor, whole(9, 3, 5), whole(9, 5)), case(aten.mul.Tensor, x, mask(3, 5))]
    out += [
        case(aten.hardtanh_backward.default, g, x, -1.0, 1.0),
        case(aten.silu_backward.default, g, x),
        case(aten.gelu_backward.default, g, x, approximate="tanh"),
    ]
    out += [
        case(aten.elu_backward.default, g, 1.5, 1.0, 1.0, True, x),
        case(aten.gelu.default, x, approximate="tanh"),
    ]
    out += [case(aten.copy.default, x, t) for t in (y, real(5), real(3, 1), x.int())]
    out += [case(op.default, x, *b) for op in (aten.clamp, aten.clip) for b in ((-1,), (None, 1.5), (-1, 1))]
    out += [case(aten.log_sigmoid_forward.default, x)]
    out += [case(aten.log_sigmoid_backward.default, g, x, aten.log_sigmoid_forward(x)[1])]
    out += [case(aten.glu.default, real(3, 14, 2), 1), case(aten.glu.default, real(5, 2))]
    out += [case(aten.glu_backward.default, real(3, 7), real(3, 14), -1)]
    return out


CASES: list[Case] = [*_pointwise(), *_pointwise_by_hand()]
