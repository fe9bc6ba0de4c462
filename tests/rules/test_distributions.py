"""The numbers that rng="counter" draws: spread, independence of place, seed, call and draw, and every distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardc.compiler.rules.ops.random.bits import DRAW, SEED, mixed, named
from shardc.compiler.rules.ops.random.distributions import DISTRIBUTIONS, Draw

aten = torch.ops.aten
N = 2**16
SEEDS = ((0, 0), (1, 2), (-1, -1), (2**62 + 12345, -8), (-(2**63), 77777777777))
SIGMAS = 5.0  # how far a sum of many may lie from what is expected: further once in two million


def bits(seed: tuple[int, int] = (7, 11), number: int = 0, digits: int = 53, shape: tuple[int, ...] = (N,)) -> Tensor:
    return DRAW(torch.empty(shape), torch.tensor(seed), number, digits)


def drawn(word: str, *args: Any, dtype: torch.dtype = torch.float32, number: int = 0, n: int = N, **options: Any):
    x = torch.zeros(n, dtype=dtype)
    draw = Draw(lambda op, *a, **k: op(*a, **k), x, lambda: torch.tensor([99, 5]), number, dtype)
    operands = () if word in ("rand", "randn", "randint", "randint.low") else (x,)
    return DISTRIBUTIONS[named(word)](draw, *operands, *args, **options)


def chi_square(cells: Tensor, count: int) -> float:
    """How many sigmas the counts of equally likely cells lie from what is expected."""
    found = torch.bincount(cells.reshape(-1), minlength=count).double()
    expected = found.sum() / count
    return float((((found - expected) ** 2 / expected).sum() - (count - 1)) / math.sqrt(2 * (count - 1)))


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two sequences of numbers in [0, 1), in sigmas."""
    a, b = a.double() - 0.5, b.double() - 0.5
    return float((a * b).mean() * 12 * math.sqrt(a.numel()))


def unit(x: Tensor) -> Tensor:
    return x.double() * 2.0**-53


@pytest.mark.parametrize("seed", SEEDS)
def test_every_group_of_bits_is_uniform(seed: tuple[int, int]):
    x = bits(seed)
    assert 0 <= int(x.min()) and int(x.max()) < 2**53
    for low in (0, 8, 21, 29, 37, 45):
        assert abs(chi_square((x >> low) & 255, 256)) < SIGMAS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("apart", [1, 2, 3, 16, 1024, 4099])
def test_neighbours_are_independent(seed: tuple[int, int], apart: int):
    x = bits(seed)
    assert abs(correlation(unit(x[:-apart]), unit(x[apart:]))) < SIGMAS
    pairs = (x[:-apart] >> 49) * 16 + (x[apart:] >> 49)
    assert abs(chi_square(pairs, 256)) < SIGMAS


OTHERS: dict[str, Callable[[], Tensor]] = {
    "another seed": lambda: bits((8, 12)),
    "the next seed of the generator": lambda: bits(drawn_seed(1)),
    "the seed of another generator": lambda: bits(drawn_seed(0, 1)),
    "the next draw": lambda: bits(number=1),
    "a later draw": lambda: bits(number=2**18),
    "another seed and draw": lambda: bits((8, 12), 1),
}


def drawn_seed(call: int, start: int = 0) -> tuple[int, int]:
    torch.manual_seed(start)
    return [tuple(SEED(torch.device("cpu")).tolist()) for _ in range(call + 1)][-1]


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_seeds_and_draws_are_independent(other: Callable[[], Tensor]):
    a, b = bits(), other()
    for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:])):
        assert abs(correlation(unit(x), unit(y))) < SIGMAS
        assert int((x == y).sum()) == 0
        assert abs(chi_square((x >> 49) * 16 + (y >> 49), 256)) < SIGMAS
        same = (x ^ y).unsqueeze(-1).bitwise_right_shift(torch.arange(53)).bitwise_and(1).double().mean(0)
        assert float((same - 0.5).abs().max()) * 2 * math.sqrt(x.numel()) < SIGMAS + 1


def test_one_flipped_bit_of_seed_or_place_flips_half_of_the_bits():
    def hashed(rows: Tensor, seed: int) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64)
        return mixed(lambda op, *a, **k: op(*a, **k), [first, rows], (2, 2**40), torch.tensor([seed, 11]), 3, 53)[0]

    at = torch.arange(4096)
    flipped = [hashed(at ^ (1 << i), 5) for i in range(40)] + [hashed(at, 5 ^ (1 << i)) for i in range(62)]
    for other in flipped:
        share = (hashed(at, 5) ^ other).unsqueeze(-1).bitwise_right_shift(torch.arange(53)).bitwise_and(1)
        share = share.double().mean(0)
        assert 0.4 < float(share.min()) and float(share.max()) < 0.6


def test_no_number_comes_twice():
    both = torch.cat([*(bits((3, 4), i, 53, (2**16,)) for i in range(4)), bits((4, 4), 0, 53, (2**16,))])
    assert both.unique().numel() == both.numel()


def test_a_draw_depends_on_the_place_in_the_whole_tensor_only():
    flat = bits(shape=(24,))
    assert torch.equal(bits(shape=(2, 3, 4)).reshape(-1), flat)
    assert torch.equal(bits(shape=(1, 24)).reshape(-1), flat)
    assert bits(shape=()).shape == () and torch.equal(bits(shape=()), flat[0])
    assert bits(shape=(0, 3)).shape == (0, 3)


# -- distributions ---------------------------------------------------------------------------------

# word, arguments -> (mean, variance, the distribution function)
CONTINUOUS: list[tuple[str, tuple, Callable[[Tensor], Tensor]]] = [
    ("rand", ([N],), lambda x: x),
    ("uniform", (-2.0, 3.0), lambda x: (x + 2) / 5),
    ("randn", ([N],), lambda x: torch.special.ndtr(x)),
    ("normal_functional", (1.0, 2.0), lambda x: torch.special.ndtr((x - 1) / 2)),
    ("log_normal", (0.5, 0.25), lambda x: torch.special.ndtr((x.log() - 0.5) / 0.25)),
    ("exponential", (2.0,), lambda x: 1 - torch.exp(-2 * x)),
    ("cauchy", (1.0, 0.5), lambda x: torch.atan((x - 1) / 0.5) / math.pi + 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("word", "args", "cdf"), CONTINUOUS, ids=[c[0] for c in CONTINUOUS])
def test_a_continuous_distribution_is_what_its_name_says(word: str, args: tuple, cdf: Callable, dtype: torch.dtype):
    x = drawn(word, *args, dtype=dtype)
    assert x.dtype == dtype and x.isfinite().all()
    u = cdf(x.double()).clamp(0, 1 - 1e-12)
    assert abs(chi_square((u * 200).long(), 200)) < SIGMAS
    largest = (u.sort().values - (torch.arange(N) + 0.5) / N).abs().max()
    assert float(largest) * math.sqrt(N) < 2.2  # Kolmogorov and Smirnov: more once in eight thousand


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli_and_dropout_keep_their_share(p: float):
    for x in (drawn("bernoulli.p", p), drawn("native_dropout", 1 - p, True)[1].float()):
        assert abs(float(x.double().mean()) - p) <= SIGMAS * math.sqrt(p * (1 - p) / N)
        assert set(x.unique().tolist()) <= {0.0, 1.0}


def test_bernoulli_of_probabilities_follows_each():
    p = torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat(N // 4)
    draw = Draw(lambda op, *a, **k: op(*a, **k), p, lambda: torch.tensor([1, 2]), 0, torch.float32)
    means = DISTRIBUTIONS[aten.bernoulli.default](draw, p).view(-1, 4).mean(0)
    assert means[0] == 0 and means[3] == 1
    assert float((means - p[:4]).abs().max()) < SIGMAS * 0.5 / math.sqrt(N / 4)


@pytest.mark.parametrize("p", [0.05, 0.3, 1.0])
def test_geometric_counts_trials(p: float):
    x = drawn("geometric", p)
    assert x.min() == 1
    cells = x.clamp(max=10).long() - 1
    expected = torch.tensor([p * (1 - p) ** k for k in range(9)] + [(1 - p) ** 9], dtype=torch.float64) * N
    found = torch.bincount(cells, minlength=10).double()
    assert float(((found - expected).abs() / (expected * (1 - expected / N)).sqrt().clamp(min=1)).max()) < SIGMAS


@pytest.mark.parametrize("span", [1, 2, 7, 1000, 2**31, 2**31 + 3, 2**40 + 1, 2**63])
def test_integers_fill_their_range(span: int):
    x = drawn("randint", span, [N], dtype=torch.int64)
    assert int(x.min()) >= 0 and int(x.max()) < span
    cells = min(span, 250)
    assert (
        abs(chi_square((x.double() / span * cells).long().clamp(max=cells - 1), cells)) < SIGMAS if span > 1 else True
    )
    if span > 2**20:
        assert int(x.max()) > span * 0.999 and (x & 1).double().mean().sub(0.5).abs() < SIGMAS / math.sqrt(N)


def test_a_wider_range_than_63_bits_is_left_to_torch():
    assert drawn("randint.low", -(2**63), 2**63 - 1, [4], dtype=torch.int64) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_short_floats_stay_inside(dtype: torch.dtype):
    x = drawn("rand", [N], dtype=dtype)
    assert x.dtype == dtype and 0 <= x.min() and x.max() < 1
    assert drawn("exponential", dtype=dtype).min() > 0
    assert drawn("randn", [N], dtype=dtype).isfinite().all()


def test_complex_normals_have_variance_one():
    x = drawn("randn", [N], dtype=torch.complex64)
    real = torch.view_as_real(x).double()
    assert x.dtype == torch.complex64
    assert (real.pow(2).mean(0) - 0.5).abs().max() < SIGMAS / math.sqrt(2 * N)
    assert (real[:, 0] * real[:, 1]).mean().abs() < SIGMAS * 0.5 / math.sqrt(N)
