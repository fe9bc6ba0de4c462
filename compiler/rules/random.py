"""Random numbers: every rank draws the whole tensor, as one device would, and keeps its piece.

So with equal generators on all ranks the global tensor does not depend on the mesh, replicas agree and
pieces differ, and nothing is sent. The price is drawing numbers that are thrown away. An operator whose
operand's values say what is drawn gets them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.compiler.rules.joint import any_split, two_step
from shardc.compiler.rules.names import apart, dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

# The result is as large as the operand, whose values do not matter.
LIKE = """
    rand_like randn_like randint_like randint_like.low_dtype rand_like.generator randn_like.generator
    randint_like.generator randint_like.low_generator_dtype
    bernoulli.p uniform normal_functional exponential geometric cauchy log_normal random random.to random.from
"""
# No operand, or one whose values matter.
WHOLE = """
    rand rand.generator randn randn.generator randint randint.generator randint.low randint.low_generator
    randperm randperm.generator normal.float_float
    bernoulli bernoulli.Tensor normal.Tensor_float normal.float_Tensor normal.Tensor_Tensor
    randint_like.Tensor randint_like.Tensor_generator
    multinomial poisson binomial _sample_dirichlet _standard_gamma
"""


def _named(word: str) -> Any:
    packet, _, overload = word.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _piece(site: Site, drawn: Any, names: Sequence[str]) -> Any:
    """This rank's part of a whole tensor."""
    for d, name in enumerate(names):
        if site.split(name):
            drawn = site.call(aten.narrow.default, drawn, d, site.start(name), site.size(name))
    return drawn


def _like(op: Any) -> Callable[..., OpRule]:
    def build(x: Any, *args: Any, results: Any, **kwargs: Any) -> OpRule:
        names = dims(x.dim())

        def localize(site: Site) -> Any:
            if not any_split(site, names):
                return site.call(op, *site.args, **site.kwargs)
            canvas = site.call(aten.new_empty.default, site.args[0], list(x.shape))
            return _piece(site, site.call(op, canvas, *site.args[1:], **site.kwargs), names)

        return parse(line([names], [names]), plain=" ".join(names), localize=localize)

    return build


def _whole(*args: Any, results: Any, **kwargs: Any) -> OpRule:
    return apart(tensors_in(args, kwargs), results)


for _word in LIKE.split():
    rule(_named(_word))(_like(_named(_word)))
for _word in WHOLE.split():
    rule(_named(_word))(_whole)


@rule(aten.native_dropout.default)
def _(x: Any, p: float, train: bool | None, *, results: Any) -> OpRule:
    names = dims(x.dim())
    text = line([names], [names, names])
    if p == 0 or train is False:
        # of nothing, the operator makes a mask of another dtype
        return parse(text, localize=two_step(aten.native_dropout.default, (), _keep_all, fed=names))

    def localize(site: Site) -> Any:
        if not any_split(site, names):
            return site.call(aten.native_dropout.default, *site.args, **site.kwargs)
        canvas = site.call(aten.new_empty.default, site.args[0], list(x.shape), dtype=torch.bool)
        mask = _piece(site, site.call(aten.bernoulli.p, canvas, 1 - p), names)
        kept = site.call(aten.mul.Tensor, site.args[0], mask)
        return site.call(aten.mul.Scalar, kept, 1 / (1 - p) if p < 1 else 0.0), mask

    return parse(text, plain=" ".join(names), localize=localize)


def _keep_all(site: Site) -> Any:
    x = site.args[0]
    return site.call(aten.clone.default, x), site.call(aten.ones_like.default, x, dtype=torch.bool)


rule(aten.native_dropout_backward.default, "..., ... -> ...", linear="0")


@rule(aten.rrelu_with_noise_functional.default)
def _(
    x: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any,
    results: Any, **__: Any,
) -> OpRule:  # fmt: skip
    return apart([x, noise], results) if training else parse("..., ... -> ..., ...")


rule(aten.rrelu_with_noise_backward.default, "..., ..., ... -> ...", linear="0")
