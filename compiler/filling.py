"""How a model comes to hold its values, each rank its shards: taken over as they are, initialised, or loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardc.compiler.errors import PlanError
from shardc.compiler.resolved import Resolved
from shardc.compiler.wording import shown
from shardc.runtime.deferred import check_fillable, drop_recipes, owners, recipes, record_init, tensors
from shardc.runtime.materialize import fill, put
from shardc.runtime.ranks import Ranks
from shardc.runtime.recipe import Recipe, generator_of
from shardc.runtime.replay import Replay
from shardc.runtime.state import broadcast, shard


def check_init(init: Any) -> None:
    """Raises PlanError for what can fill nothing."""
    if init is not None and not callable(init) and not isinstance(init, (Mapping, str, os.PathLike)):
        raise PlanError(
            f"init is {shown(init)}, which ought to be callable, a state_dict or a path",
            help="a function is called with every module that owns tensors on meta; None calls its reset_parameters",
        )


@dataclass
class Filling:
    """One model on its way to its ranks. ranks: None where all are simulated here, and tensors stay whole."""

    model: nn.Module
    plan: Resolved
    ranks: Ranks | None
    source: int | None  # the rank whose values win

    def fill(self, init: Any) -> None:
        """Give every parameter and buffer its values and its layout. Raises PlanError for what stays without."""
        built = recipes(self.model)
        owned = owners(self.model, built)
        function = callable(init) and not isinstance(init, Mapping)
        if init is None:
            check_fillable(self.model, owned)
        on_meta = [name for name, x in tensors(self.model).items() if x.is_meta]
        self._agree(built)
        fill(self.model, built, on_meta, self._place)
        drop_recipes(self.model)
        if owned and (init is None or function):
            self._initialise(owned, init, on_meta)
        if self.ranks is not None:
            self._take_over(self.ranks, set(on_meta))

    def _initialise(self, owned: dict[str, list[str]], init: Any, on_meta: list[str]) -> None:
        """As the source rank would draw. It and those that start as it does go on from where it ends."""
        device = torch.device(self.ranks.device_mesh.device_type if self.ranks is not None else "cpu")
        generators = list(dict.fromkeys([torch.default_generator, generator_of(device)]))
        own = [g.get_state() for g in generators]
        start = [self._of_source(state) for state in own]
        try:
            for g, state in zip(generators, start, strict=True):
                g.set_state(state)
            recipe = record_init(self.model, owned, init, device)
            fill(self.model, [recipe], on_meta, self._place)
        finally:
            for g, state in zip(generators, own, strict=True):
                g.set_state(state)
        for g, place in recipe.ends:
            i = generators.index(g)
            if torch.equal(own[i], start[i]):
                g.set_state(Replay(recipe).state(place))

    def _of_source(self, state: Tensor) -> Tensor:
        if self.ranks is None or self.source is None:
            return state
        sent = state.to(self.ranks.device_mesh.device_type, copy=True)
        broadcast(sent, self.ranks.device_mesh, self.source)
        return sent.cpu()

    def _agree(self, built: list[Recipe]) -> None:
        """Ranks that built other modules, or from other seeds, would hold shards of different tensors."""
        if self.ranks is not None and built:
            self.ranks.agree("\n".join(recipe.text() for recipe in built), "how deferred_init built the module")

    def _place(self, fqn: str, x: Tensor, value: Tensor) -> Tensor:
        """What this rank holds of whole values that are of no further use."""
        made = nn.Parameter(value, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else value
        return made if self.ranks is None else self._held_by(made, fqn, self.ranks)

    def _take_over(self, ranks: Ranks, done: set[str]) -> None:
        """Give every rank the source's values, then leave it its shards. Tied parameters stay one object."""
        made: dict[int, Tensor] = {}
        for fqn, x in tensors(self.model).items():
            if fqn in done:
                continue
            if id(x) in made:
                put(self.model, fqn, made[id(x)])
                continue
            if self.source is not None and x.numel():
                with torch.no_grad():
                    broadcast(x, ranks.device_mesh, self.source)
            made[id(x)] = self._held_by(x, fqn, ranks)
            put(self.model, fqn, made[id(x)])

    def _held_by(self, x: Tensor, fqn: str, ranks: Ranks) -> Tensor:
        layout = self.plan.layout(fqn)
        spec = layout.stored_spec(ranks.mesh) if layout is not None else None
        return x if spec is None or spec.is_whole else shard(x, spec, ranks.device_mesh, ranks.coords)
