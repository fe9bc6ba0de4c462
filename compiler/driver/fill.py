"""How a model comes to hold its values, each rank its shards: taken over as they are, initialised, or loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardc.compiler.errors import CheckpointError, PlanError
from shardc.compiler.plan.layout import shown
from shardc.compiler.plan.resolved import Resolved
from shardc.runtime.run.ranks import Ranks
from shardc.runtime.values.deferred import check_fillable, drop_recipes, owners, recipes, record_init, tensors
from shardc.runtime.values.materialize import fill, put
from shardc.runtime.values.recipe import Recipe, generator_of
from shardc.runtime.values.replay import Replay
from shardc.runtime.values.spread import Spread
from shardc.runtime.values.weights import weights
from shardc.runtime.wire.distribute import as_dtensor, broadcast, shard

ON_META = object()  # as init: what is on meta stays there, for a program that is looked at and not run


def check_init(init: Any) -> None:
    """Raises PlanError for what can fill nothing."""
    if init is ON_META:
        return
    source, function = _parts(init)
    if (source is not None and not _is_source(source)) or (function is not None and not callable(function)):
        raise PlanError(
            f"init is {shown(init)}, which ought to be callable, a state_dict or a path, or a pair of these",
            help="a function is called with every module that owns tensors on meta; None calls its reset_parameters; "
            "of a pair (state_dict or path, function) the function fills what the first lacks",
        )


def _is_source(init: Any) -> bool:
    return isinstance(init, (Mapping, str, os.PathLike))


def _parts(init: Any) -> tuple[Any, Any]:
    """What is loaded, and what fills the rest: a function, or None for `reset_parameters`."""
    if isinstance(init, tuple) and len(init) == 2:
        return init
    return (init, None) if _is_source(init) else (None, init)


@dataclass
class Filling:
    """One model on its way to its ranks. ranks: None where all are simulated here, and tensors stay whole."""

    model: nn.Module
    plan: Resolved
    ranks: Ranks | None
    source: int | None  # the rank whose values win

    def fill(self, init: Any) -> None:
        """Give every parameter and buffer its values and its layout. Raises PlanError for what stays without."""
        if init is ON_META:
            drop_recipes(self.model)
            return
        built = recipes(self.model)
        owned = owners(self.model, built)
        source, function = _parts(init)
        if source is None and function is None:
            check_fillable(self.model, owned)  # a mistake, of which no other rank is asked
        self._agree_on_names()
        on_meta = [name for name, x in tensors(self.model).items() if x.is_meta]
        spread = self._source(source, on_meta) if source is not None else None
        if spread is not None:
            owned = self._never_loaded(owned, spread.missing if isinstance(init, tuple) else ())
            if spread.missing and not isinstance(init, tuple) and not isinstance(source, Mapping):
                help = "nothing was loaded; init=(path, function) fills what it lacks"
                raise CheckpointError(f"{source} has no {', '.join(spread.missing)}", help=help)
        if function is None:
            check_fillable(self.model, owned)
        self._agree(built)
        loaded = self._load(spread) if spread is not None else set()
        rest = [name for name in on_meta if name not in loaded]
        fill(self.model, built, rest, self._place)
        drop_recipes(self.model)
        if owned:
            fresh = [f"{prefix}.{n}" if prefix else n for prefix, names in owned.items() for n in names]
            self._initialise(owned, function, fresh if source is not None else rest)
        if self.ranks is not None:
            self._take_over(self.ranks, set(on_meta))

    def _never_loaded(self, owned: dict[str, list[str]], missing: Collection[str]) -> dict[str, list[str]]:
        """Of these tensors those that no state_dict holds, and those that this one lacks."""
        found = {}
        for prefix, names in owned.items():
            hidden = self.model.get_submodule(prefix)._non_persistent_buffers_set
            if some := [n for n in names if n in hidden or (f"{prefix}.{n}" if prefix else n) in missing]:
                found[prefix] = some
        return found

    def _source(self, source: Any, on_meta: list[str]) -> Spread:
        """What a state_dict or a path has of the tensors that are on meta."""
        held, state = tensors(self.model), self.model.state_dict()
        if not on_meta:
            raise PlanError("init is given, but nothing is on meta", help="load into the compiled module instead")
        groups: dict[int, list[str]] = {}
        for name in (name for name in on_meta if name in state):
            groups.setdefault(id(held[name]), []).append(name)
        wanted = [(names, held[names[0]]) for names in groups.values()]
        spread = Spread(wanted, list(state), self.ranks, self.source)
        spread.look(lambda: weights(source))
        return spread

    def _load(self, spread: Spread) -> set[str]:
        """Names of the tensors that got their values from there."""
        loaded: set[str] = set()
        for names, value in spread.whole():
            x = tensors(self.model)[names[0]]
            made = self._place(names[0], x, value)
            if not isinstance(made, DTensor):  # a shard is a copy already
                made.data = made.data.clone()
            for name in names:
                put(self.model, name, made)
            loaded |= set(names)
        return loaded

    def allocate(self, names: Collection[str]) -> None:
        """Memory for those of these tensors that are still on meta, for values that come at once."""
        made: dict[int, Tensor] = {}
        held = tensors(self.model)
        wanted = {id(held[name]) for name in names if name in held and held[name].is_meta}
        for name, x in held.items():
            if id(x) not in wanted:
                continue
            if id(x) not in made:
                made[id(x)] = self.room(name, x)
            put(self.model, name, made[id(x)])

    def room(self, name: str, x: Tensor) -> Tensor:
        """What this rank will hold of a tensor that is still on meta, without values."""
        device = self.ranks.device_mesh.device_type if self.ranks is not None else "cpu"
        if self.ranks is None or not isinstance(x, nn.Parameter):
            made = torch.empty_like(x, device=device)
            return nn.Parameter(made, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else made
        spec = self.plan.stored(name, x.shape)
        local = torch.empty(spec.local_shape(self.ranks.mesh, self.ranks.coords), dtype=x.dtype, device=device)
        piece = as_dtensor(local, spec, self.ranks.device_mesh) if self.plan.has_shards else local
        return nn.Parameter(piece, requires_grad=x.requires_grad)

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

    def _agree_on_names(self) -> None:
        """Ranks whose modules hold other tensors would wait for each other in collectives that do not pair."""
        if self.ranks is not None:
            held = tensors(self.model).items()
            lines = [f"{n}: {x.dtype}{[*x.shape]}{' requires grad' if x.requires_grad else ''}" for n, x in held]
            self.ranks.agree("\n".join(lines), "what the module holds")

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
        spec = self.plan.stored(fqn, x.shape)
        plain = not self.plan.has_shards if isinstance(x, nn.Parameter) else spec.is_whole
        return x if plain else shard(x, spec, ranks.device_mesh, ranks.coords)
