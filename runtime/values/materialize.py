"""Gives what is on meta its values: one storage at a time whole, of which a rank keeps its piece."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from shardc.compiler.errors import PlanError
from shardc.compiler.user_code import warn_user
from shardc.runtime.values.deferred import PLACE, tensors
from shardc.runtime.values.recipe import Recipe
from shardc.runtime.values.replaced import replaced
from shardc.runtime.values.replay import Replay

Place = Callable[[str, Tensor, Tensor], Tensor]  # (FQN, what is on meta, whole values) -> what the module is to hold


def fill(model: nn.Module, recipes: Sequence[Recipe], only: Collection[str], place: Place) -> None:
    """Make what recipes know among these tensors of a model, and put what `place` returns under all its names.

    Largest at once: one storage (of a parameter, mostly) beside what is kept, and what its own calls need meanwhile.
    Memory that the constructor or an init function made and left as it came is left so, with a warning that names it.
    Raises PlanError that lists tensors which an init was to fill and did not.
    """
    held = {name: x for name, x in tensors(model).items() if name in only}
    missing = [name for name, x in held.items() for recipe in recipes if x.numel() and recipe.waits(x)]
    if missing:
        raise _no_values(missing)
    left: list[str] = []
    made: dict[int, Tensor] = {}
    for recipe in recipes:
        replay = Replay(recipe)
        groups: dict[int, list[str]] = {}
        for name, x in held.items():
            if recipe.knows(x):
                groups.setdefault(recipe.ref(x).storage, []).append(name)
        for storage in sorted(groups, key=replay.last_draw):  # so that each draw is made once
            memory = replay.storages([storage])[0]
            for name in groups[storage]:
                x = held[name]
                ref = recipe.ref(x)
                if not memory.holds(ref):
                    if ref.storage in recipe.waiting:
                        raise _no_values([name])
                    left.append(name)
                if id(x) not in made:
                    made[id(x)] = place(name, x, memory.view(ref))
                put(model, name, made[id(x)])
            del memory
        for module in model.modules():
            _fill_attributes(module, recipe, replay)
    if left:
        warn_user(f"nothing was written to {', '.join(left)}: they hold what memory held, as in a normal build")


def put(model: nn.Module, fqn: str, x: Tensor) -> None:
    """Make a tensor the parameter or buffer of this name."""
    owner, _, name = fqn.rpartition(".")
    module = model.get_submodule(owner)
    table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    replaced(table[name], x)
    table[name] = x


def _no_values(names: Sequence[str]) -> PlanError:
    return PlanError(
        f"nothing gives values to: {', '.join(names)}",
        help="fill them in the constructor, in reset_parameters, or in the function given as init",
    )


def _fill_attributes(module: nn.Module, recipe: Recipe, replay: Replay) -> None:
    """Tensors that a module holds as plain attributes, perhaps in lists and dicts."""
    for name, value in list(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules", PLACE) or not any(recipe.knows(x) for x in _tensors(value)):
            continue

        def real(x: Tensor) -> Tensor:
            return replay.value(recipe.ref(x)) if recipe.knows(x) else x

        vars(module)[name] = pytree.tree_map_only(Tensor, real, value)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))
