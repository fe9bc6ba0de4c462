"""The programs of a module, by the calls they serve: as many as are kept, the last used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shardc.compiler.analysis.program import Program
from shardc.compiler.ir.collectives import COLLECTIVES
from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import spec
from shardc.compiler.ir.signature import OutputKind
from shardc.runtime.run.executable import Executable

PROGRAMS = 64  # kept, of each kind: calls of more shapes than this, in turn, compile again


@dataclass(eq=False)
class Entry:
    """A program and the function that runs it."""

    program: Program
    run: Executable

    def __post_init__(self) -> None:
        moves = (move_of(node) for node in self.program.gm.graph.nodes)
        self.moves = any(move is not None and move.target in COLLECTIVES for move in moves)
        signature = self.program.signature
        self.holds = signature.holds
        self.there = [signature.outputs[i].node is not None for i in signature.indices(OutputKind.OUTPUT)]
        self.mutated = signature.indices(OutputKind.MUTATION)
        # a call with nothing but tensors, one after another, which the key of a call has counted
        self.plain = not signature.keywords and len(signature.leaves) == signature.positional
        self.plain = self.plain and all(leaf.input is not None for leaf in signature.leaves)
        self.one = signature.out_spec.is_leaf() and self.there == [True] and not signature.outputs[0].number
        self.effects = bool(signature.effects)
        effected = returned(self.program.gm)[signature.out_spec.num_leaves : len(self.there)] if self.effects else []
        # of the values that forward sets elsewhere, which are a rank's part alone
        self.pieces = [not spec(node).is_whole for node in effected if node is not None]

    def result(self, values: list[Any]) -> Any:
        """What the user gets, of the outputs that have a value."""
        return values[0] if self.one else self.program.signature.unflatten_outputs(values)


class Entries:
    """Entries by the key of a call, the last used last, and under each key one for every state of what was read
    beside the call. Those that move something are counted by themselves: all ranks use them in one order, and so
    forget the same."""

    def __init__(self) -> None:
        self._kept: dict[Any, list[Entry]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def keys(self) -> Iterable[Any]:
        return self._kept

    def get(self, key: Any) -> Entry | None:
        """The entry for a call that is made now."""
        for entry in self._kept.get(key, ()):
            if entry.holds():
                self._kept[key] = self._kept.pop(key)
                return entry
        return None

    def add(self, key: Any, entry: Entry) -> Entry | None:
        """Keep an entry; the one that goes for it, if there are too many."""
        alike = [(k, e) for k, entries in self._kept.items() for e in entries if e.moves == entry.moves]
        self._kept.setdefault(key, []).append(entry)
        if len(alike) < PROGRAMS:
            return None
        oldest, gone = alike[0]
        self._kept[oldest].remove(gone)
        return gone

    def changed(self, key: Any) -> list[str]:
        """What was read for a program of this call and is another now: of that program where it is least."""
        reads = [entry.program.signature.reads for entry in self._kept.get(key, ())]
        return min((one.changed() for one in reads if one is not None), key=len, default=[])
