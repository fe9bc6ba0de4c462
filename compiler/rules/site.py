"""What a localize function sees: one operator call on one rank, in words of factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Wanted = Callable[[int, int], Sequence[range]]


class Site(Protocol):
    """One call being made local. Sizes are ints, or symbolic where they differ between ranks; both take + - *, and
    % as the last.

    `args`, `kwargs` are the call's own, with each tensor replaced by its local piece.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def split(self, factor: str) -> bool:
        """Whether some mesh dim splits the factor here."""
        ...

    def size(self, factor: str) -> Any:
        """How many indices of the factor this rank holds."""
        ...

    def start(self, factor: str) -> Any:
        """The first index of a `plain=` factor that this rank holds."""
        ...

    def stop(self, factor: str) -> Any:
        """The index behind the last of a `plain=` factor that this rank holds."""
        ...

    def runs(self, factor: str) -> list[tuple[int, Any, Any]]:
        """The parts a factor is made of, major to minor: (global size, first index held, how many are)."""
        ...

    def full(self, factor: str) -> int:
        """The factor's global size."""
        ...

    def place(self, factor: str) -> Any:
        """Which piece of a `plain=` factor this rank holds: pieces are counted in the order of their indices."""
        ...

    def ways(self, factor: str) -> int:
        """Into how many pieces the factor is split."""
        ...

    def least(self, factor: str) -> int:
        """The fewest indices of the factor that some rank of the mesh holds."""
        ...

    def may_be_empty(self, factor: str) -> bool:
        """Whether some rank of the mesh holds no index of the factor."""
        ...

    def result_shape(self, i: int = 0) -> list[Any]:
        """Local sizes of the i-th result."""
        ...

    def operand_shape(self, i: int = 0) -> list[Any]:
        """Local sizes of the i-th tensor operand."""
        ...

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Emit an operator on local tensors."""
        ...

    def of_first_rank(self, x: Any) -> Any:
        """What the mesh's first rank holds, on every rank."""
        ...

    def fetch(self, x: Any, dim: int, factor: str, wanted: Wanted, of: str = "", fill: float | None = None) -> Any:
        """Of a local tensor split along dim by a `plain=`, `lone=` factor: other indices than this rank holds, from
        the ranks that hold them. wanted: of (first index, how many) that a rank holds of the factor `of`, by default
        the same, the global indices it gets. fill: what stands for indices that there are not."""
        ...

    def all_reduce(self, x: Any, factor: str, op: str = "sum") -> Any:
        """Combine a local tensor over the mesh dims that split the factor ("sum", "max", "min", "prod")."""
        ...
