"""Distributions, made of the bits that `shardc.draw` gives each element: what rng="counter" draws.

Written once, against `Draw.call`: a graph writes the operators down, `Original.run` runs them. Elements depend on
nothing but the seed, the number of the draw and their place, so every layout gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardc.compiler.rules.ops.random.bits import DRAW, SEED, named

__all__ = ["DISTRIBUTIONS", "SEED", "Draw"]

aten = torch.ops.aten

DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}  # that a number in [0, 1) holds
WORDS = 4  # draws of bits that one operator may need


@dataclass
class Draw:
    """One random operator being drawn: the `number`-th of its program.

    like: a tensor of the result's shape, split as the result shall be. seed: makes the seed where it is wanted first.
    dtype: the result's. call: runs an operator.
    """

    call: Callable[..., Any]
    like: Any
    seed: Callable[[], Any]
    number: int
    dtype: torch.dtype
    _word: int = field(default=0, init=False)

    def bits(self, digits: int) -> Any:
        """Integers from 0 to 2^digits - 1; other ones at each call."""
        self._word += 1
        return self.call(DRAW, self.like, self.seed(), self.number * WORDS + self._word - 1, digits)

    @property
    def wide(self) -> torch.dtype:
        """What to compute in."""
        return torch.float64 if self.dtype in (torch.float64, torch.complex128) else torch.float32

    def cast(self, x: Any, dtype: torch.dtype | None = None) -> Any:
        return self.call(aten._to_copy.default, x, dtype=dtype or self.dtype)

    def narrowed(self, x: Any) -> Any:
        """From the dtype it was computed in."""
        return x if self.dtype == self.wide else self.cast(x)

    def scaled(self, x: Any, times: float, plus: float = 0.0) -> Any:
        x = x if times == 1 else self.call(aten.mul.Scalar, x, times)
        return x if plus == 0 else self.call(aten.add.Scalar, x, plus)

    def unit(self, dtype: torch.dtype) -> Any:
        """In [0, 1)."""
        digits = DIGITS[dtype]
        return self.scaled(self.cast(self.bits(digits), dtype), 2.0**-digits)

    def inside(self, dtype: torch.dtype) -> Any:
        """In (0, 1), both ends left out: odd multiples, which the dtype holds exactly."""
        digits = DIGITS[dtype] - 1
        odd = self.scaled(self.bits(digits), 2, 1)
        return self.scaled(self.cast(odd, dtype), 2.0 ** -(digits + 1))

    def around(self, dtype: torch.dtype) -> Any:
        """In (-1, 1), as often on either side."""
        digits = DIGITS[dtype]
        odd = self.scaled(self.bits(digits), 2, 1 - 2**digits)
        return self.scaled(self.cast(odd, dtype), 2.0**-digits)

    def normal(self) -> Any:
        """Of mean 0 and variance 1."""
        if self.dtype.is_complex:
            return self._complex(lambda: self.scaled(self._gauss(), math.sqrt(0.5)))
        return self.narrowed(self._gauss())

    def uniform(self) -> Any:
        return self._complex(lambda: self.unit(self.wide)) if self.dtype.is_complex else self.unit(self.dtype)

    def below(self, p: float) -> Any:
        """Truth with probability p."""
        return self.call(aten.lt.Scalar, self.bits(53), math.ceil(p * 2.0**53))

    def integer(self, span: int) -> Any:
        """From 0 to span - 1, of at most 2^63."""
        if span <= 2**31:
            return self.call(aten.bitwise_right_shift.Tensor_Scalar, self.scaled(self.bits(32), span), 32)
        high, low = self.bits(32), self.bits(31)
        both = self.call(aten.bitwise_or.Tensor, self.scaled(high, 2**31), low)
        return both if span == 2**63 else self.call(aten.remainder.Scalar, both, span)

    def _gauss(self) -> Any:
        return self.scaled(self.call(aten.erfinv.default, self.around(self.wide)), math.sqrt(2))

    def _complex(self, part: Callable[[], Any]) -> Any:
        return self.cast(self.call(aten.complex.default, part(), part()))


# What a call gives, or None where torch has to draw it. Operands first, as ATen has them.
DISTRIBUTIONS: dict[Any, Callable[..., Any]] = {}


def _draws(words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        DISTRIBUTIONS.update({named(word): fn for word in words.split()})
        return fn

    return register


@_draws("rand rand.generator rand_like rand_like.generator")
def _rand(draw: Draw, *_: Any, **__: Any) -> Any:
    return draw.uniform()


@_draws("uniform")
def _uniform(draw: Draw, x: Any, low: float = 0.0, high: float = 1.0, **_: Any) -> Any:
    return draw.scaled(draw.uniform(), high - low, low)


@_draws("randn randn.generator randn_like randn_like.generator")
def _randn(draw: Draw, *_: Any, **__: Any) -> Any:
    return draw.normal()


@_draws("normal_functional")
def _normal(draw: Draw, x: Any, mean: float = 0.0, std: float = 1.0, **_: Any) -> Any:
    return draw.scaled(draw.normal(), std, mean)


@_draws("normal.float_float")
def _normal_of_size(draw: Draw, mean: float, std: float, *_: Any, **__: Any) -> Any:
    return draw.scaled(draw.normal(), std, mean)


@_draws("normal.Tensor_float normal.float_Tensor normal.Tensor_Tensor")
def _normal_of(draw: Draw, mean: Any, std: Any = 1.0, **_: Any) -> Any:
    out = draw.normal()
    out = draw.scaled(out, std) if isinstance(std, (int, float)) else draw.call(aten.mul.Tensor, out, std)
    return draw.scaled(out, 1, mean) if isinstance(mean, (int, float)) else draw.call(aten.add.Tensor, out, mean)


@_draws("log_normal")
def _log_normal(draw: Draw, x: Any, mean: float = 1.0, std: float = 2.0, **_: Any) -> Any:
    return draw.call(aten.exp.default, draw.scaled(draw.normal(), std, mean))


@_draws("exponential")
def _exponential(draw: Draw, x: Any, rate: float = 1.0, **_: Any) -> Any:
    return draw.narrowed(draw.scaled(draw.call(aten.log.default, draw.inside(draw.wide)), -1 / rate))


@_draws("cauchy")
def _cauchy(draw: Draw, x: Any, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Any:
    angle = draw.scaled(draw.around(torch.float64), math.pi / 2)  # a float's half pi may lie beyond the pole
    return draw.cast(draw.scaled(draw.call(aten.tan.default, angle), sigma, median))


@_draws("geometric")
def _geometric(draw: Draw, x: Any, p: float, **_: Any) -> Any:
    """How many trials up to the first success."""
    trials = draw.call(aten.log.default, draw.inside(torch.float64))
    trials = draw.scaled(trials, 1 / math.log1p(-p) if p < 1 else 0.0)
    return draw.cast(draw.call(aten.clamp.default, draw.call(aten.ceil.default, trials), 1))


@_draws("bernoulli.p")
def _bernoulli(draw: Draw, x: Any, p: float = 0.5, **_: Any) -> Any:
    return draw.cast(draw.below(p))


@_draws("bernoulli bernoulli.Tensor")
def _bernoulli_of(draw: Draw, x: Any, p: Any = None, **_: Any) -> Any:
    p = x if p is None else p
    return draw.cast(draw.call(aten.lt.Tensor, draw.unit(torch.float64), p))


@_draws("native_dropout")
def _dropout(draw: Draw, x: Any, p: float, train: bool | None = None) -> Any:
    if train is False or p == 0:
        return draw.call(aten.clone.default, x), draw.call(aten.ones_like.default, x, dtype=torch.bool)
    mask = draw.below(1 - p)
    kept = draw.call(aten.mul.Tensor, x, mask)
    return draw.scaled(kept, 1 / (1 - p) if p < 1 else 0.0), mask


def _between(draw: Draw, low: int, high: int) -> Any:
    return draw.cast(draw.scaled(draw.integer(high - low), 1, low)) if high - low <= 2**63 else None


@_draws("randint randint.generator")
def _randint(draw: Draw, high: int, *_: Any, **__: Any) -> Any:
    return _between(draw, 0, high)


@_draws("randint.low randint.low_generator")
def _randint_low(draw: Draw, low: int, high: int, *_: Any, **__: Any) -> Any:
    return _between(draw, low, high)


@_draws("randint_like randint_like.generator random.to")
def _randint_like(draw: Draw, x: Any, high: int, **_: Any) -> Any:
    return _between(draw, 0, high)


@_draws("randint_like.low_dtype randint_like.low_generator_dtype random.from")
def _randint_like_low(draw: Draw, x: Any, low: int, high: int | None = None, **_: Any) -> Any:
    return _between(draw, low, _end(draw.dtype) if high is None else high)


@_draws("random")
def _random(draw: Draw, x: Any, **_: Any) -> Any:
    return _between(draw, 0, _end(draw.dtype))


def _end(dtype: torch.dtype) -> int:
    """One more than the largest number that `random_` draws."""
    if dtype == torch.bool:
        return 2
    return 2 ** DIGITS[dtype] + 1 if dtype.is_floating_point else torch.iinfo(dtype).max + 1


def like_of(args: Sequence[Any], shape: Sequence[int], shape_of: Callable[[Any], Any]) -> Any | None:
    """The first operand of the result's shape, whose layout the draw takes over."""
    return next((x for x in args if shape_of(x) is not None and tuple(shape_of(x)) == tuple(shape)), None)
