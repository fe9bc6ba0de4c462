"""A finished program's parts: the graph at its stages, what its ends are, and what it moves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import GraphModule

from shardc.compiler.analysis.bytes_moved import Collective, collectives_of
from shardc.compiler.analysis.explain import cause
from shardc.compiler.ir.halves import Halves, halves
from shardc.compiler.ir.signature import Signature
from shardc.compiler.ir.text import input_names, text
from shardc.compiler.pipeline.runner import Record
from shardc.compiler.pipeline.stages import Stage
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.hardware import NEUTRAL, Hardware
from shardc.compiler.spec.mesh import Mesh


@dataclass(eq=False)
class Lowered:
    """One traced signature of a module, laid out over a mesh. `gm` is the last stage's joint graph."""

    gm: GraphModule
    global_gm: GraphModule  # the RESHARDED stage: runs on one device, collectives being identities
    signature: Signature
    mesh: Mesh
    plan: Resolved
    records: Sequence[Record]
    original: Any = None  # a `Reference`: runs the unsharded module
    chosen: GraphModule | None = None  # the SHARDED stage: layouts without what moves
    hardware: Hardware = NEUTRAL

    def __str__(self) -> str:
        return text(self.gm, self.mesh, input_names(self.signature))

    def stage(self, name: str) -> str:
        """The program's text as it stood at the end of a stage: TRACED, SHARDED, RESHARDED, LOCAL, SCHEDULED."""
        try:
            wanted = Stage[name.upper()]
        except KeyError:
            raise ValueError(f"no stage {name!r}; stages are {', '.join(s.name for s in Stage)}") from None
        if wanted is Stage.TRACED:
            return self.records[0].before
        return [r.after for r in self.records if r.stage <= wanted][-1]

    @cached_property
    def hash(self) -> str:
        """Of the program's text: the same on every rank."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    @cached_property
    def halves(self) -> Halves:
        """Forward and backward graphs."""
        return halves(self.gm, self.signature)

    def collectives(self) -> list[Collective]:
        """What moves, forward first; what backward computes again moves in both."""
        names, nodes = input_names(self.signature), {n.name: n for n in self.gm.graph.nodes}

        def why(c: Collective) -> str:
            return c.why or cause(nodes[c.name].all_input_nodes[0], c.mesh_dim, names)

        forward, backward = self.halves.forward, self.halves.backward
        late = [c._replace(phase="backward") for c in collectives_of(backward, self.mesh)] if backward else []
        return [c._replace(why=why(c)) for c in [*collectives_of(forward, self.mesh), *late]]

    def notes(self) -> list[str]:
        """What tracing and passes report: operators without a rule, for example."""
        return [*self.signature.notes, *(note for record in self.records for note in record.notes)]
