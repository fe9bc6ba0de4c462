"""The resolved plan as a table: each parameter, where it lies, which entry says so, its bytes per rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from shardc.compiler.spec.mesh import Mesh


class Report(list[dict[str, Any]]):
    """Rows in parameter order, as dicts; `str` of it is the table, `total` the bytes of the fullest rank."""

    def __init__(
        self, rows: Iterable[dict[str, Any]], mesh: Mesh, unmatched: Sequence[str], warnings: Sequence[str]
    ) -> None:
        super().__init__(rows)
        self.mesh, self.unmatched, self.warnings = mesh, tuple(unmatched), tuple(warnings)

    @property
    def total(self) -> int:
        """Bytes of parameters on the fullest rank."""
        return sum(row["bytes_per_rank"] for row in self)

    @property
    def whole(self) -> int:
        """Bytes of all parameters on one device."""
        return sum(row["bytes"] for row in self)

    def __str__(self) -> str:
        cells = [("parameter", "stored", "bytes/rank", "plan")]
        cells += [(r["fqn"], r["layout"], str(r["bytes_per_rank"]), ", ".join(map(_place, r["keys"]))) for r in self]
        cells.append(("total", "", str(self.total), f"of {self.whole}"))
        lines = [str(self.mesh), *_aligned(cells)]
        lines += dict.fromkeys(key for row in self for key in row["keys"] if key != _place(key))
        lines += [f"{row['fqn']} = {alias}" for row in self for alias in row["aliases"]]
        lines += [f"{row['fqn']}: {note}" for row in self for note in row["notes"]]
        lines += [f"matches nothing: {key}" for key in self.unmatched]
        lines += [f"warning: {text}" for text in self.warnings if not any(k in text for k in self.unmatched)]
        return "\n".join(lines)


def _place(key: str) -> str:
    """Where a line stands in the plan: `tp["emb"]` of `tp["emb"] = RowwiseParallel()`."""
    return key.split(" = ")[0]


def _aligned(cells: Sequence[tuple[str, str, str, str]]) -> list[str]:
    wide = [max(len(row[i]) for row in cells) for i in range(3)]
    return [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d}".rstrip() for a, b, c, d in cells]
