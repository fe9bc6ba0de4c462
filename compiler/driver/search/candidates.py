"""Plans to compare: what each mesh dim does, as entries of a plan, the simplest first.

A mesh dim splits the batch, parameters being whole on every rank, split and kept once gathered, or split; or it splits
groups of parameters, and with them or not the sequence between. No parallelism is known by name: which dims of which
parameters go together the graph says, and what a plan is worth its program's cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardc.compiler.driver.search.costs import Estimate
from shardc.compiler.driver.search.groups import Group
from shardc.compiler.driver.search.spelling import Spelling
from shardc.compiler.plan.entries import FullyShard, Replicated
from shardc.compiler.plan.plan import Plan
from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh

MOST = 2  # mesh dims that split groups
FEW = 2
Entries = dict[str, object]
Cost = Callable[[Plan], Estimate | None]


@dataclass
class Candidates:
    """Of one model over a mesh. axes: the mesh dims that no annotation speaks of. kept: what is given, and not changed;
    taken: by mesh dim the parameters that it speaks of."""

    axes: tuple[str, ...]
    mesh: Mesh
    hardware: Hardware
    groups: Sequence[Group]
    spelling: Spelling
    units: tuple[str, ...]
    kept: Entries
    taken: Mapping[str, set[str]]
    cost: Cost
    _found: dict[str, list[list[Group]]] = field(default_factory=dict)

    def plans(self) -> Iterator[Plan]:
        """Each way to share out the mesh dims between batch and parameters, and of each the ways to store these."""
        seen: set[Any] = set()
        for tensor in self._tensor_dims():
            ways = self._split(tensor)
            rest = [a for a in self.axes if a not in tensor and a not in self.kept]
            for i, stored in enumerate(itertools.product(self._stores(), repeat=len(rest))):
                for entries in ways if i == 0 else self._promising(ways, rest):
                    plan = self.plan({**entries, **dict(zip(rest, stored, strict=True))})
                    alike = self._form(plan)
                    if alike not in seen:
                        seen.add(alike)
                        yield plan

    def _promising(self, ways: Sequence[Entries], rest: Sequence[str]) -> list[Entries]:
        """Of ways to split parameters the fastest few and the smallest few, all else being whole: how parameters are
        stored over the other mesh dims adds to each about the same."""
        found = [self.cost(self.plan({**entries, **dict.fromkeys(rest, Replicated())})) for entries in ways]
        there = [(way, cost) for way, cost in zip(ways, found, strict=True) if cost is not None]
        fast, small = (sorted(range(len(there)), key=lambda i: there[i][1][by])[:FEW] for by in (0, 1))
        return [there[i][0] for i in sorted({*fast, *small})]

    def _form(self, plan: Plan) -> Any:
        """The same of plans that differ only in which of two mesh dims that are alike does what."""
        return tuple(sorted((*map(str, self._kind(axis)), repr(entry)) for axis, entry in plan.entries.items()))

    def _kind(self, axis: str) -> tuple[Any, ...]:
        """What there is to know of a mesh dim but its name: where it is given what it does, nothing is like it."""
        return self.mesh[axis], self.hardware.link(self.mesh, axis), axis if axis in self.kept else ""

    def plan(self, entries: Entries) -> Plan:
        """In the order of the mesh, what is given included."""
        found = {**self.kept, **entries}
        return Plan(**{axis: found[axis] for axis in self.mesh.names if axis in found})

    def _stores(self) -> tuple[object, ...]:
        """The ways to store parameters over a mesh dim that splits the batch."""
        return Replicated(), FullyShard(*self.units, reshard_after_forward=False), FullyShard(*self.units)

    def _tensor_dims(self) -> Iterator[tuple[str, ...]]:
        """Mesh dims that may split groups, inner ones first; of mesh dims that are alike the inner ones do."""
        open_ = [a for a in reversed(self.axes) if self.mesh[a] > 1 and isinstance(self.kept.get(a, {}), Mapping)]
        seen = set()
        for count in range(min(MOST, len(open_)) + 1):
            for dims in itertools.combinations(open_, count):
                form = tuple(sorted(map(str, map(self._kind, dims))))
                if form not in seen:
                    seen.add(form)
                    yield dims

    def _split(self, tensor: tuple[str, ...]) -> list[Entries]:
        """What these mesh dims split, all others being on the batch: the groups that cost least over the first, without
        the sequence and with."""
        if not tensor:
            return [{}]
        if tensor[0] not in self._found:
            self._found[tensor[0]] = self._best(tensor[0])
        return [
            {axis: self._entry(axis, self._fitting(axis, chosen), along) for axis in tensor}
            for chosen in self._found[tensor[0]]
            for along in (False, True)
        ]

    def _best(self, axis: str) -> list[list[Group]]:
        """Groups for one mesh dim: each by itself, and then together, the best first, for as long as it gets less. What
        is left of those that the best one excludes is tried by itself too."""
        rest = {a: Replicated() for a in self.axes if a != axis and a not in self.kept}

        def cost(chosen: Sequence[Group]) -> float:
            found = self.cost(self.plan({**rest, axis: self._entry(axis, chosen)}))
            return float("inf") if found is None else found.seconds

        whole = cost([])
        fitting = self._fitting(axis, self.groups)
        alone = {g: cost([g]) for g in fitting}
        left = sorted((g for g in fitting if alone[g] < whole), key=alone.__getitem__)
        found = []
        while left:
            first, *others = left
            chosen, least = [first], alone[first]
            for group in others:
                if group.fits({name for g in chosen for name, _ in g.dims}) and (now := cost([*chosen, group])) < least:
                    least, chosen = now, [*chosen, group]
            more = list(chosen)  # what costs time but saves memory: tables
            for group in fitting:
                more += [group] if group.fits({name for g in more for name, _ in g.dims}) else []
            found += [chosen, more] if more != chosen else [chosen]
            left = [g for g in others if not g.fits({name for name, _ in first.dims})]
        return found

    def _fitting(self, axis: str, groups: Sequence[Group]) -> list[Group]:
        """Those that a mesh dim may split, beside what it is given."""
        return [g for g in groups if g.size > 1 and g.fits(self.taken.get(axis, set()))]

    def _entry(self, axis: str, chosen: Sequence[Group], sequence: bool = False) -> Entries:
        kept = self.kept.get(axis, {})
        assert isinstance(kept, Mapping)
        return {**kept, **self.spelling.entry(chosen, sequence, self.taken.get(axis, set()))}
