"""Random numbers that do not depend on the layout: drawn from a seed, the number of the draw, and the element's
index in the whole tensor.

    %seed: i64[2] = shardc.seed(cpu)                       128 bits of torch's default generator, the first rank's
    %draw: i64[8@dp, 16] = shardc.draw(%x, %seed, 4, 24)   24 random bits for each element, as large as x

`compiler/draws.py` makes every distribution of these bits. Operators that torch alone knows how to draw are
called whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.compiler.rules.notation import apart, dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

Call = Callable[..., Any]  # runs an operator, or writes it down


@torch.library.custom_op("shardc::seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def seed(device: torch.device) -> Tensor:
    """Two random numbers of 64 bits."""
    return torch.randint(-(2**63), 2**63 - 1, [2], device=device)


@seed.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty([2], dtype=torch.int64, device=device)


@torch.library.custom_op("shardc::draw", mutates_args=())
def draw(like: Tensor, seed: Tensor, number: int, digits: int) -> Tensor:
    """Random integers from 0 to 2^digits - 1, at most 53 digits, in the shape of `like`, which is not read."""
    rows = [torch.arange(n, device=like.device) for n in like.shape]
    return mixed(lambda op, *args, **kwargs: op(*args, **kwargs), rows, like.shape, seed, number, digits)


@draw.register_fake
def _(like: Tensor, seed: Tensor, number: int, digits: int) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.int64)


SEED, DRAW = torch.ops.shardc.seed.default, torch.ops.shardc.draw.default


def _signed(n: int) -> int:
    """As an int64, modulo 2^64."""
    return (n + 2**63) % 2**64 - 2**63


STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
TIMES = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the multipliers of SplitMix64


def mixed(call: Call, rows: Sequence[Any], shape: Sequence[int], seed: Any, number: int, digits: int) -> Any:
    """Hashes of the elements at these indices. rows: of each dim of a whole tensor of this shape, the indices held.

    The index times STEP plus one key goes through SplitMix64's two rounds, and another key is added between them:
    with one key alone, the numbers of two draws would be pieces of one sequence. A draw's keys are the seed's two
    numbers, each moved by a hash of the draw's own. Twelve operators as large as the result; smaller parts are
    summed first.
    """
    first, second = (
        call(aten.add.Scalar, call(aten.select.int, seed, 0, i), _signed(_hash(2 * number + i))) for i in range(2)
    )
    x = first
    for d, row in enumerate(rows):
        part = call(aten.mul.Scalar, row, _signed(math.prod(shape[d + 1 :]) * STEP))
        x = call(aten.add.Tensor, call(aten.unsqueeze.default, x, -1), part)
    x = call(aten.mul.Scalar, _folded(call, x, 30), _signed(TIMES[0]))
    x = call(aten.add.Tensor, x, second)
    x = call(aten.mul.Scalar, _folded(call, x, 27), _signed(TIMES[1]))
    return _shifted(call, x, 64 - digits)  # the highest bits, which depend on all others


def _hash(n: int) -> int:
    """SplitMix64's n-th number."""
    n = (n + 1) * STEP % 2**64
    n = (n ^ n >> 30) * TIMES[0] % 2**64
    n = (n ^ n >> 27) * TIMES[1] % 2**64
    return n ^ n >> 31


def _folded(call: Call, x: Any, by: int) -> Any:
    return call(aten.bitwise_xor.Tensor, x, _shifted(call, x, by))


def _shifted(call: Call, x: Any, by: int) -> Any:
    """Shifted right, zeros coming in: torch copies the sign."""
    x = call(aten.bitwise_right_shift.Tensor_Scalar, x, by)
    return call(aten.bitwise_and.Scalar, x, 2 ** (64 - by) - 1)


@rule(SEED)
def _(device: Any, *, results: Any) -> OpRule:
    return parse("-> n", whole="n", localize=lambda site: site.of_first_rank(site.call(SEED, device)))


@rule(DRAW)
def _(like: Any, seed: Any, number: int, digits: int, *, results: Any) -> OpRule:
    names = dims(like.dim())

    def localize(site: Site) -> Any:
        rows = [_held(site, name, like.device) for name in names]
        return mixed(site.call, rows, like.shape, site.args[1], number, digits)

    return parse(line([names, ["s"]], [names]), whole="s", localize=localize)


def _held(site: Site, name: str, device: torch.device) -> Any:
    """The global indices of a factor that this rank holds, in its order."""
    out = None
    for full, start, size in site.runs(name):
        run = site.call(aten.arange.default, size, dtype=torch.int64, device=device)
        run = run if isinstance(start, int) and start == 0 else site.call(aten.add.Scalar, run, start)
        if out is not None:
            outer = site.call(aten.unsqueeze.default, site.call(aten.mul.Scalar, out, full), -1)
            run = site.call(aten.reshape.default, site.call(aten.add.Tensor, outer, run), [-1])
        out = run
    return out


# -- drawn whole -----------------------------------------------------------------------------------

WHOLE = """
    rand rand.generator randn randn.generator randint randint.generator randint.low randint.low_generator
    rand_like randn_like randint_like randint_like.low_dtype rand_like.generator randn_like.generator
    randint_like.generator randint_like.low_generator_dtype randint_like.Tensor randint_like.Tensor_generator
    uniform normal_functional exponential geometric cauchy log_normal random random.to random.from
    normal.float_float normal.Tensor_float normal.float_Tensor normal.Tensor_Tensor
    bernoulli bernoulli.p bernoulli.Tensor native_dropout
    randperm randperm.generator multinomial poisson binomial _sample_dirichlet _standard_gamma
"""


def named(word: str) -> Any:
    """The ATen operator that a word such as `randint.low` names."""
    packet, _, overload = word.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _whole(*args: Any, results: Any, **kwargs: Any) -> OpRule:
    return apart(tensors_in(args, kwargs), results)


for _word in WHOLE.split():
    rule(named(_word))(_whole)


rule(aten.native_dropout_backward.default, "..., ... -> ...", linear="0")


@rule(aten.rrelu_with_noise_functional.default)
def _(
    x: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any,
    results: Any, **__: Any,
) -> OpRule:  # fmt: skip
    return apart([x, noise], results) if training else parse("..., ... -> ..., ...")


rule(aten.rrelu_with_noise_backward.default, "..., ..., ... -> ...", linear="0")
