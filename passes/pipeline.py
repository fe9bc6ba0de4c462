"""The list of passes, in order, one reason each."""

from __future__ import annotations

from typing import Any

from shardc.compiler.pipeline.runner import Context
from shardc.passes.layouts.average_gradients import AverageGradients
from shardc.passes.layouts.canonicalize import Canonicalize
from shardc.passes.layouts.choose_factors import ChooseFactors
from shardc.passes.layouts.choose_layouts import ChooseLayouts
from shardc.passes.layouts.draw_whole import DrawWhole
from shardc.passes.layouts.fuse_cross_entropy import FuseCrossEntropy
from shardc.passes.layouts.name_dims import NameDims
from shardc.passes.layouts.number_draws import NumberDraws
from shardc.passes.layouts.propagate import Propagate
from shardc.passes.layouts.regather_in_backward import RegatherInBackward
from shardc.passes.layouts.seed_plan import SeedPlan
from shardc.passes.local.fuse_bias import FuseBias
from shardc.passes.local.join_messages import JoinMessages
from shardc.passes.local.localize import Localize
from shardc.passes.local.overlap import Overlap
from shardc.passes.local.pack_operands import PackOperands
from shardc.passes.local.reduce_in_place import ReduceInPlace
from shardc.passes.local.shorten_views import ShortenViews
from shardc.passes.reshards.delay_reductions import DelayReductions
from shardc.passes.reshards.insert_reshards import InsertReshards
from shardc.passes.reshards.lower_reshards import LowerReshards
from shardc.passes.reshards.merge_equal import MergeEqual

LOCALIZE = Localize()  # also what proves a user's rule
# What only makes a right program better; `compile(..., without=("overlap",))` leaves it out.
OPTIONAL = (
    "fuse-cross-entropy",
    "average-gradients",
    "regather-in-backward",
    "choose-layouts",
    "merge-equal",
    "delay-reductions",
    "shorten-views",
    "fuse-bias",
    "join-messages",
    "overlap",
    "reduce-in-place",
)
PLAIN = ("average-gradients", "overlap")  # of these what is left out is how they do it best: it must be done


def first_passes(ctx: Context) -> list[Any]:
    """Those that need no layouts: after them the compiler also settles how parameters are stored."""
    return [
        Canonicalize(),  # fewer spellings, so fewer rules
        NameDims(),  # ... and indices that point nowhere else
        NumberDraws() if ctx.rng == "counter" else DrawWhole(),  # random numbers that no layout changes
    ]


def pipeline(ctx: Context) -> list[Any]:
    """Every pass of one compilation, less what the user left out."""
    return [step for step in _passes(ctx) if step.name not in ctx.without or step.name in PLAIN]


def _passes(ctx: Context) -> list[Any]:
    overlap = Overlap(window=0) if "overlap" in ctx.without else Overlap()
    average = AverageGradients(early="average-gradients" not in ctx.without)
    return [
        *first_passes(ctx),
        FuseCrossEntropy(),  # split classes then need no reduction in backward
        SeedPlan(),  # the user's wishes become layouts
        average,  # each rank's loss is its own; fewer passes over memory where what is small is divided
        RegatherInBackward(),  # memory for wire: freed parameters are gathered again
        ChooseFactors(),  # ... of whole heads where heads will be needed whole
        Propagate(),  # ... and reach every value                                    TRACED -> SHARDED
        ChooseLayouts(),  # where it disagrees with itself: all together, to cost least
        InsertReshards(),  # disagreements become explicit                           SHARDED -> RESHARDED
        MergeEqual(),  # before lowering: one reshard per value and layout
        LowerReshards(),  # ... and cost something
        MergeEqual(),  # the first legs of two ways may be the same
        DelayReductions(),  # fewer messages: branches beside a residual are summed before they are reduced
        LOCALIZE,  # global shapes end here                                        RESHARDED -> LOCAL
        PackOperands(),  # pieces may lie in memory otherwise than the whole did
        ShortenViews(),  # fewer calls: the ends of chains of views
        FuseBias(),  # ... and the product with its bias, where it is no pending sum
        JoinMessages(),  # latency: what a unit gathers, and gradients, move at once
        overlap,  # it fixes the order                                             LOCAL -> SCHEDULED
        ReduceInPlace(),  # ... and so what is dead when a reduction starts
    ]
