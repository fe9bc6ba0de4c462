"""What is so of an operator whatever it is called on, each question answered once. What it does to layouts is its rule.

Views are what operators' own schemas say, also where they may be copies: a reshape of what lies otherwise is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.compiler.rules.checks import CHECKS

aten = torch.ops.aten
CAST = aten._to_copy.default
ASSERT = aten._assert_scalar.default
UNSAID = {  # views whose schemas do not say so
    aten._unsafe_view.default,
    aten.conj_physical.default,
    aten.lift.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
}
# What composite operators make of their operands before they call these, they do when forward is traced; found by
# running every operator of torch's database again with each operand in another order of memory.
AS_TRACED = {
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.nll_loss2d_backward.default,
    aten._pdist_forward.default,
    aten._pdist_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.fractional_max_pool2d_backward.default,
    aten.fractional_max_pool3d_backward.default,
    *(getattr(aten, f"_scaled_dot_product_{kind}_attention{of}{half}").default
      for kind, of in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
      for half in ("", "_backward")),
}  # fmt: skip
PACKED = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.embedding.default}
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def is_view(op: Any) -> bool:
    """Whether results lie in an operand's memory, or may."""
    return isinstance(op, OpOverload) and (op.is_view or op in UNSAID)


def is_thin(op: Any) -> bool:
    """Whether several elements of a result may lie in one place."""
    return op in (aten.expand.default, aten.as_strided.default)


def computes(op: Any) -> bool:
    """Whether an operator keeps a device busy and gives memory of its own."""
    return isinstance(op, OpOverload) and not is_view(op) and not op._schema.is_mutable


def relies_on_strides(op: Any) -> bool:
    """Whether a kernel takes it that its operands lie in memory as they did when traced, and does not look."""
    return op in AS_TRACED


def gives_contiguous(op: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether results are contiguous however operands lie."""
    copied = op is aten.clone.default and kwargs.get("memory_format") is torch.contiguous_format
    return copied or op is aten.contiguous.default or op in PACKED


def is_cheap(op: Any) -> bool:
    """Whether to make results again rather than keep them: they move no data, or as much as a gather does anyway."""
    return is_view(op) or op is CAST


def draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers; attention without dropout is tagged so but does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    given = dict(zip([a.name for a in op._schema.arguments], args, strict=False)) | dict(kwargs)
    return bool(given.get("dropout_p", None) != 0)


def raises(op: Any) -> bool:
    """Whether an operator is there to raise where one device would, and not for its result."""
    return op in CHECKS or op is ASSERT


def written(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(argument's declaration, value) of what a call writes to."""
    for i, declared in enumerate(op._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            yield declared, args[i] if i < len(args) else kwargs.get(declared.name)
