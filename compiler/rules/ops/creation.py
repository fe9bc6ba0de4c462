"""Operators that make a tensor from nothing but its size: their dims follow whoever uses them."""

from __future__ import annotations

from typing import Any

import torch

from shardc.compiler.rules.notation import apart, dims, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten


@rule(aten.full.default)
@rule(aten.zeros.default)
@rule(aten.ones.default)
@rule(aten.empty.memory_format)
@rule(aten._efficientzerotensor.default)
def _(size: Any, *value: Any, results: Any, **options: Any) -> OpRule:
    return parse(line([], [dims(len(size))]), shape_arg=0)


# Only an operand's dims are read; that a sum of zeros is zeros lets one that is still pending pass.
rule(aten.zeros_like.default, "... -> ...", linear="0")
rule(aten.empty_like.default, "... -> ...", linear="0")
rule(aten.ones_like.default, "... -> ...")
rule(aten.full_like.default, "... -> ...")


def _new(op: Any, linear: str) -> None:
    """An operand of other sizes is not read at all: however it is split, the result is complete."""

    def build(x: Any, size: Any, *value: Any, results: Any, **options: Any) -> OpRule:
        if x.shape == results[0].shape:
            return parse("... -> ...", linear=linear, shape_arg=1)
        left, right = [f"x{i}" for i in range(x.dim())], dims(len(size))
        return parse(line([left], [right]), joined=" ".join(left), linear=linear, shape_arg=1)

    rule(op)(build)


_new(aten.new_zeros.default, "0")
_new(aten.new_empty.default, "0")
_new(aten.new_ones.default, "")
_new(aten.new_full.default, "")


def _arange(op: Any) -> None:
    def build(*bounds: Any, results: Any, **options: Any) -> OpRule:
        if not all(isinstance(b, int) for b in bounds):
            return apart([], results)
        start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)

        def local(site: Site) -> Any:
            """Numbers moved to where the rank's begin, as integers: a short float would round on the way."""
            if not site.split("n"):
                return site.call(op, *site.args, **site.kwargs)
            row = site.call(aten.arange.default, site.size("n"), **{**site.kwargs, "dtype": torch.int64})
            row = site.call(aten.mul.Scalar, row, step) if step != 1 else row
            row = site.call(aten.add.Scalar, row, site.start("n") * step + start)
            return site.call(aten._to_copy.default, row, dtype=results[0].dtype)

        return parse("-> n", plain="n", localize=local)

    rule(op)(build)


for _overload in ("default", "start", "start_step"):
    _arange(getattr(aten.arange, _overload))


@rule(aten.scalar_tensor.default)
@rule(aten.eye.default)
@rule(aten.eye.m)
@rule(aten.linspace.default)
@rule(aten.logspace.default)
@rule(aten.range.default)
@rule(aten.range.step)
@rule(aten.tril_indices.default)
@rule(aten.triu_indices.default)
@rule(aten.empty_strided.default)
@rule(aten.empty_permuted.default)
@rule(aten.new_empty_strided.default)
def _(*args: Any, results: Any, **kwargs: Any) -> OpRule:
    """Made whole on every rank: what a number is depends on where it stands."""
    return apart(tensors_in(args, kwargs), results)
