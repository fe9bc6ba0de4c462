"""The one form that every entry of a plan is read into, once: who is meant, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.distributed.tensor import Placement

from shardc.compiler.plan.entries import DataEntry


@dataclass(frozen=True)
class Border:
    """What a style says about a tensor that enters or leaves a module, over one mesh dim.

    index: position among the positional arguments, name of a keyword argument, or position in a tuple
        that is returned; None for every tensor that is returned.
    declared: how an incoming value lies (None: however it does). It describes a root input; inside the
        program a value lies as it lies.
    desired: what the module takes, or what leaves it; None: as it is. Dims may be negative.
    open: the style chose `desired`, so which factor of the dim it splits is open.
    explicit: the user wrote a layout that is not the style's default.
    module, axis, key: whose, over which mesh dim and by which entry, once the wish has met its model.
    """

    side: Literal["in", "out"]
    index: int | str | None
    declared: Placement | None
    desired: Placement | None
    open: bool = False
    explicit: bool = True
    module: str = ""
    axis: str = ""
    key: str = ""


@dataclass(frozen=True)
class Style:
    """What is asked of a module, or of a parameter.

    split: what becomes of the module's parameters, nothing where empty; a placement is for a parameter itself.
    takes, gives: layouts at the border that differ from the split's own. borders: further ones, given in full.
    counts: lengths of the lists of layouts, for "in" and "out".
    table: a parameter that is meant is a lookup table.
    """

    split: Literal["columns", "rows", "whole", ""] | Placement = ""
    takes: Placement | None = None
    gives: Placement | None = None
    borders: tuple[Border, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    table: bool = False


@dataclass(frozen=True, eq=False)
class Wish:
    """One line of a plan, over one mesh dim.

    patterns: over FQNs that begin inside of the module `root`. asks: of what matches. text: the line as written,
    `tp["emb"] = RowwiseParallel()`. means: what may be meant; the first that matches is.
    """

    axis: str
    patterns: tuple[str, ...]
    asks: Style | DataEntry
    text: str
    root: str = ""
    means: tuple[Literal["modules", "tensors"], ...] = ("modules",)

    @property
    def place(self) -> str:
        """Where it stands in the plan: `tp["emb"]`."""
        return self.text.partition(" = ")[0]
