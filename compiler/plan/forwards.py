"""What a module's forward takes: the names and kinds of its parameters, where its signature tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Forward:
    """A signature; `rest` and `options` name `*args` and `**kwargs`. `known` is False where there is none."""

    known: bool = False
    positional: tuple[str, ...] = ()
    keyword: tuple[str, ...] = ()
    required: int = 0  # how many of the positional ones have no default
    rest: str = ""
    options: str = ""

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Forward:
        """The signature of a callable; an unknown one for what has none, as some scripted modules."""
        try:
            parameters = list(inspect.signature(forward).parameters.values())
        except (TypeError, ValueError):
            return cls(rest="args")

        def named(*kinds: Any) -> tuple[str, ...]:
            return tuple(p.name for p in parameters if p.kind in kinds)

        kinds = inspect.Parameter
        positional = named(kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        return cls(
            True,
            positional,
            named(kinds.KEYWORD_ONLY),
            sum(p.name in positional and p.default is p.empty for p in parameters),
            next(iter(named(kinds.VAR_POSITIONAL)), ""),
            next(iter(named(kinds.VAR_KEYWORD)), ""),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters that have a name of their own."""
        return self.positional + self.keyword

    def may_have(self, name: str) -> bool:
        """Whether an argument may be passed by this name."""
        return not self.known or bool(self.options) or name in self.names

    def may_take(self, count: int) -> bool:
        """Whether this many arguments may be passed by position."""
        return not self.known or bool(self.rest) or count <= len(self.positional)
