"""Resampling, padding, patches, grids, and pooling without windows: spatial dims are whole, batch and channels free.

Most of these operators take an empty batch but no empty channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from shardc.compiler.rules.notation import dims, line
from shardc.compiler.rules.steps import dense
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

# Every tensor is `... c` and as many spatial dims as the name says; backwards are linear in the gradient.
LINEAR = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    reflection_pad1d reflection_pad2d reflection_pad3d
    reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
    replication_pad1d replication_pad2d replication_pad3d
    replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
"""
NOT_LINEAR = "max_unpool2d max_unpool3d"
# These are told the shape of what they return, batch and channels too.
RESAMPLED_BACKWARD = """
    upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
    _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
    upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward
    upsample_trilinear3d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward
"""


# These read their arguments as if they were contiguous.
PACKED = (aten.adaptive_max_pool3d_backward.default,)


def _spatial(rank: int, linear: str = "", **options: Any) -> Callable[..., OpRule]:
    """Of integers the averages are rounded, so no sum passes through."""

    def build(*args: Any, results: Any, **kwargs: Any) -> OpRule:
        passed = linear if results[0].is_floating_point() or results[0].is_complex() else ""
        lead = dims(results[0].dim() - rank)
        spatial = [
            [[f"{side}{i}.{d}" for d in range(rank)] for i in range(count)]
            for side, count in (("x", len(tensors_in(args, kwargs))), ("y", len(results)))
        ]
        left, right = ([[*lead, *names] for names in tensors] for tensors in spatial)
        whole = " ".join(n for tensors in spatial for names in tensors for n in names)
        return parse(line(left, right), whole=whole, nonempty=lead[-1], linear=passed, **options)

    return build


def spatial(op: Any, rank: int, linear: str = "") -> Callable[..., OpRule]:
    """The rule of an operator whose last dims, so many, stay whole."""

    def build(*args: Any, results: Any, **kwargs: Any) -> OpRule:
        lead = dims(results[0].dim() - rank)
        packed = {"localize": dense(op, range(len(args)), lead)} if op in PACKED else {}
        return _spatial(rank, linear=linear, **packed)(*args, results=results, **kwargs)

    return build


def _register(words: str, **options: Any) -> None:
    for word in words.split():
        rank = int(re.findall(r"(\d)d", word)[0])
        rule(getattr(aten, word).default)(_spatial(rank, **options))


_register(LINEAR, linear="0")
_register(NOT_LINEAR)
_register(RESAMPLED_BACKWARD, linear="0", shape_arg=2)

# -- channels and space exchanged --------------------------------------------------------------------


def _pixels(few: str, many: str) -> Callable[..., OpRule]:
    """Of nothing, these return a wrong shape."""

    def build(x: Any, factor: int, *, results: Any) -> OpRule:
        lead = " ".join(dims(x.dim() - 3))
        text = f"{lead} {few} -> {lead} {many}"
        return parse(text, whole="r h w H W", nonempty=f"{lead} c", linear="0")

    return build


rule(aten.pixel_shuffle.default)(_pixels("(c r) h w", "c H W"))
rule(aten.pixel_unshuffle.default)(_pixels("c H W", "(c r) h w"))


@rule(aten.channel_shuffle.default)
def _(x: Any, groups: int, *, results: Any) -> OpRule:
    rest = dims(x.dim() - 2)
    text = line([["b", "(g c)", *rest]], [["b", "(c g)", *rest]])
    return parse(text, whole="g", sizes={"g": groups}, linear="0")


@rule(aten.im2col.default)
def _(x: Any, *_: Any, results: Any) -> OpRule:
    batch = ["b"] * (x.dim() - 3)
    text = line([[*batch, "c", "h", "w"]], [[*batch, "(c k)", "l"]])
    return parse(text, whole="h w k l", nonempty="c", linear="0")


@rule(aten.col2im.default)
def _(x: Any, *_: Any, results: Any) -> OpRule:
    batch = ["b"] * (x.dim() - 2)
    text = line([[*batch, "(c k)", "l"]], [[*batch, "c", "h", "w"]])
    return parse(text, whole="h w k l", nonempty="c", linear="0")


# -- samples at the points of a grid -----------------------------------------------------------------

rule(aten.grid_sampler_2d.default, "b c h w, b p q e -> b c p q", whole="h w e", linear="0")
rule(aten.grid_sampler_3d.default, "b c d h w, b p q r e -> b c p q r", whole="d h w e", linear="0")


def _grid_backward(image: str, grid: str, points: str, whole: str) -> Callable[..., OpRule]:
    def build(*args: Any, results: Any) -> OpRule:
        made = [image, grid] if args[-1][0] else [grid]  # torch always computes the grid's
        text = f"b c {points}, {image}, {grid} -> {', '.join(made)}"
        return parse(text, sum=f"c {points}", whole=whole, linear="0")

    return build


rule(aten.grid_sampler_2d_backward.default)(_grid_backward("b c h w", "b p q e", "p q", "h w e"))
rule(aten.grid_sampler_3d_backward.default)(_grid_backward("b c d h w", "b p q r e", "p q r", "d h w e"))
