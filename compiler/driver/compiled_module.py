"""The module that compile returns: called like the model, holding the model's parameters under their own names."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.fill import Filling
from shardc.compiler.driver.kept_gradients import ALL, Sync
from shardc.compiler.driver.lowering import Lowering
from shardc.compiler.driver.program_cache import Entry
from shardc.compiler.errors import CheckpointError, PlanError, ShardingError
from shardc.compiler.ir.signature import InputKind
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.spec import Spec
from shardc.compiler.user_code import call_site
from shardc.runtime.shards import cut
from shardc.runtime.values.deferred import tensors
from shardc.runtime.values.spread import Spread
from shardc.runtime.wire.distribute import as_dtensor, as_held, local_of, whole
from shardc.runtime.wire.norms import Piece, scale, total_norm


class CompiledModule(nn.Module):
    """A model bound to a plan and a mesh. Submodules, parameters and buffers are the model's own objects."""

    def __init__(self, model: nn.Module, lowering: Lowering) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        self.__dict__["_model"] = model
        self.__dict__["_lowering"] = lowering
        self.__dict__["_owners"] = _Owners(model)
        self.__dict__["_unsynced"] = ()
        self.__dict__["_on_meta"] = bool(_on_meta(model))

    # ---- calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*self.prepared(args, kwargs))

    def prepared(self, args: Any, kwargs: Any) -> tuple[Entry, list[Any]]:
        """The program for a call that is about to run, and its inputs in signature order."""
        if self._on_meta:
            self._check_loaded()
        self._owners.check()
        device = self._lowering.plan.device_id
        if device is not None:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        entry = self._lowering.serve(args, kwargs, self._sync())
        return entry, self._flat(entry, args, kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Program:
        """Compile for inputs like these ahead of time, from real, fake or meta tensors."""
        return self._lowering.entry(args, kwargs).program

    def _flat(self, entry: Entry, args: Any, kwargs: Any) -> list[Any]:
        signature = entry.program.signature
        plain = entry.plain and not kwargs and all(isinstance(x, Tensor) for x in args)
        given = args if plain else signature.flatten_inputs(args, kwargs)
        rest, flat = (local_of(x) if x.requires_grad else x for x in given), []
        for item in signature.inputs:
            if item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                flat.append(self._owners.get(item.name))
            elif item.kind is InputKind.CONSTANT:
                flat.append(item.value)
            elif item.kind is InputKind.BATCH:
                flat.append(next(rest))
        return flat

    def _call(self, entry: Entry, flat: list[Any]) -> Any:
        outputs, mutations = entry.run(flat)
        self.mutate(entry, flat, mutations)
        return entry.result([v for v, there in zip(outputs, entry.there, strict=True) if there])

    def mutate(self, entry: Entry, flat: list[Any], mutations: list[Any]) -> None:
        """Write what forward changed back to where it came from."""
        signature = entry.program.signature
        for value, place in zip(mutations, entry.mutated, strict=True):
            source = signature.outputs[place].of
            with torch.no_grad():
                local_of(flat[source or 0]).copy_(value)

    @property
    def in_pieces(self) -> set[str]:
        """The parameters of which ranks hold pieces."""
        return {fqn for fqn, layout in self._lowering.plan.params.items() if not layout.stored.is_whole}

    # ---- gradient accumulation

    def no_sync(self, *units: str) -> AbstractContextManager[None]:
        """Leave data-parallel reductions out; the next synchronised backward makes them up, at once.

        units: patterns of the gather units ("" is the root's own) whose gradients stay back, the others being
        reduced; none means all. Outside of FullyShard, where there are no units, a module means all that it holds.
        Raises PlanError for a pattern that matches none.
        """
        plan = self._lowering.plan
        try:
            return self._keeping(plan.of_units(units) if units else tuple(plan.params))
        except PlanError as error:
            raise error.at(call_site()) from None

    @contextmanager
    def _keeping(self, names: Collection[str]) -> Iterator[None]:
        before = self._unsynced
        self.__dict__["_unsynced"] = tuple(n for n in self._lowering.plan.params if n in before or n in names)
        try:
            yield
        finally:
            self.__dict__["_unsynced"] = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any module; gradients kept at unsynchronised steps are forgotten too."""
        super().zero_grad(set_to_none)
        self._lowering.kept.clear()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients, in place, so that their norm as one vector is at most `max_norm`. All ranks call it.

        norm_type: any p above zero, or inf. What several ranks hold alike counts once; gradients that stay local
        (ignored parameters) count on every rank. Returns the norm before, the same on every rank. Raises
        ValueError for another norm_type, ShardingError while gradients of unsynchronised steps are kept back.
        """
        p = float(norm_type)
        if not p > 0:
            raise ValueError(f"norm_type is {norm_type}: it is a number above zero, or inf")
        if self._lowering.kept.layouts():
            raise ShardingError(
                "gradients of unsynchronised steps are not reduced yet, so their norm is not known",
                where=call_site(),
                help="run a synchronised backward, outside of no_sync(), before clip_grad_norm_",
            )
        return self.clip({name: x.grad for name, x in self.named_parameters()}, max_norm, p)

    def clip(self, gradients: Mapping[str, Tensor | None], max_norm: float, p: float) -> Tensor:
        """`clip_grad_norm_` of these gradients, local or distributed, by parameter; all parameters have an entry."""
        device = next((x.device for x in self.parameters()), torch.device("cpu"))
        ranks = self._lowering.ranks
        pieces = [Piece(x if x is None else local_of(x), self._split_over(name)) for name, x in gradients.items()]
        norm = total_norm(pieces, p, ranks.lines if ranks is not None else {}, device)
        dtypes = [piece.gradient.dtype.to_real() for piece in pieces if piece.gradient is not None]
        norm = norm.to(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))
        scale([piece.gradient for piece in pieces if piece.gradient is not None], norm, max_norm)
        return norm

    def _split_over(self, name: str) -> tuple[str, ...]:
        """The mesh dims along which ranks have different gradients of a parameter."""
        layout = self._lowering.plan.layout(name)
        return tuple(a for a in self._lowering.mesh.names if layout and a in (*layout.stored.axes(), *layout.local))

    def _sync(self) -> Sync:
        if self._lowering.ranks is None or not torch.is_grad_enabled():
            return ALL  # simulated ranks: a kept sum and a reduced one are the same global tensor
        keep = self._unsynced
        return Sync(keep, tuple(carry for carry in self._lowering.kept.layouts() if carry[0] not in keep))

    # ---- state

    def train(self, mode: bool = True) -> CompiledModule:
        super().train(mode)
        self._model.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own: same keys; sharded parameters are DTensors that share the live shards."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors or shards, in place; every rank passes the same whole tensors."""
        ranks = self._lowering.ranks
        held = tensors(self._model)
        self._allocate([key for key, x in state_dict.items() if key in held and x.shape == held[key].shape])
        if ranks is None:
            return self._model.load_state_dict(state_dict, strict, assign)
        live = {**dict(self._model.named_parameters(remove_duplicate=False)), **dict(self._model.named_buffers())}
        placed = {
            key: self.placed(key, value, live[key]) if key in live else value for key, value in state_dict.items()
        }
        return self._model.load_state_dict(placed, strict, assign)

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Whole tensors on every rank; with rank0_only an empty dict on the others. All ranks must call it."""
        ranks = self._lowering.ranks
        keeps = not rank0_only or ranks is None or not any(ranks.coords.values())
        state = {}
        for key, x in self.state_dict().items():
            value = whole(x)
            if keeps:
                state[key] = value
        return state

    def load_full_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the whole tensors that the first rank passes; what others pass is not looked at. All ranks must call it.

        Raises CheckpointError, on every rank and before anything is loaded, for names and shapes that do not fit.
        """
        ranks, state = self._lowering.ranks, self.state_dict(keep_vars=True)
        groups: dict[int, list[str]] = {}
        for key, x in state.items():
            groups.setdefault(id(x), []).append(key)
        spread = Spread([(keys, state[keys[0]]) for keys in groups.values()], list(state), ranks, 0)
        spread.look(lambda: state_dict)
        if spread.missing:
            raise CheckpointError(f"no values for: {', '.join(spread.missing)}", help="nothing was loaded")
        self._allocate(state)
        live = tensors(self._model)
        for keys, value in spread.whole():
            held = live[keys[0]]
            piece = cut(value, self._stored(keys[0]), ranks.mesh, ranks.coords) if ranks is not None else value
            with torch.no_grad():
                local_of(held).copy_(piece)

    def _allocate(self, names: Collection[str]) -> None:
        """Make room for what is still on meta, and about to be loaded."""
        if not self._on_meta:
            return
        self._filling().allocate(names)
        self.__dict__["_owners"] = _Owners(self._model)
        self.__dict__["_on_meta"] = bool(_on_meta(self._model))

    def _filling(self) -> Filling:
        return Filling(self._model, self._lowering.plan, self._lowering.ranks, None)

    def room_like(self, name: str) -> Tensor:
        """New memory in the layout that this rank holds a parameter or buffer in, or will once it is loaded."""
        x = tensors(self._model)[name]
        return self._filling().room(name, x).detach() if x.is_meta else torch.empty_like(x.detach())

    def _check_loaded(self) -> None:
        missing = _on_meta(self._model)
        self.__dict__["_on_meta"] = bool(missing)
        if missing:
            raise PlanError(
                f"still on meta, without values: {', '.join(missing)}",
                where=call_site(),
                help="load them (load_state_dict, load_checkpoint) before the first call",
            )

    def placed(self, key: str, value: Tensor, held: Tensor) -> Tensor:
        """A whole tensor or a DTensor, laid out as the parameter or buffer `held` of this name."""
        ranks = self._lowering.ranks
        if ranks is None:
            return whole(value)
        return as_held(value, held, self._stored(key), ranks.device_mesh, ranks.coords)

    def labelled(self, key: str, local: Tensor) -> Tensor:
        """A local tensor of a sharded parameter's local shape, under the parameter's global layout."""
        ranks = self._lowering.ranks
        return local if ranks is None else as_dtensor(local, self._stored(key), ranks.device_mesh)

    def _stored(self, key: str) -> Spec:
        return self._lowering.plan.stored(key, self._owners.get(key).shape)

    def follow(self, follower: Callable[[nn.Parameter, Callable[[Tensor], Tensor]], None]) -> None:
        """Have a function called for each parameter that the first program stores in another layout, with what
        moves local tensors that are laid out as the parameter was. Of what several hold, all ranks move theirs."""
        self._lowering.followers.append(follower)

    # ---- what was compiled

    @property
    def programs(self) -> list[Program]:
        """Every compiled program, newest last."""
        return self._lowering.programs

    def save_programs(self, path: str | os.PathLike[str]) -> None:
        """Write what was traced so far to a file, as JSON: a process that loads it need not trace. Parameters are
        not in it. A compile over a fake process group, or for an abstract mesh, will do to make one.

        Raises ShardingError for a program that calls what has no name (a higher-order operator), or whose inputs or
        results are of a container type that has none.
        """
        self._lowering.save(path)

    def load_programs(self, path: str | os.PathLike[str]) -> None:
        """Take in what `save_programs` wrote; calls of that form are then served without tracing.

        Raises PlanError, naming the difference, where it was saved for another mesh, plan, module, option or
        version, or is damaged; OSError where there is no such file.
        """
        self._lowering.load(path)

    @property
    def plan(self) -> Resolved:
        """The plan as resolved: `print(compiled.plan.report())`."""
        return self._lowering.plan

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)


def _on_meta(model: nn.Module) -> list[str]:
    return [name for name, x in tensors(model).items() if x.is_meta]


class _Owners:
    """Where each parameter and buffer lives, to fetch them at every call and to notice strangers."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._tables: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._seen: list[tuple[dict[str, Any], list[str], list[Any], list[Any]]] = []
        for prefix, module in model.named_modules(remove_duplicate=False):
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None:
                        self._places[f"{prefix}.{name}" if prefix else name] = (table, name)
            for table in (module._parameters, module._modules):
                self._tables.append((prefix, table, _outline(table)))
                shapes = [x.shape if isinstance(x, Tensor) else None for x in table.values()]
                self._seen.append((table, list(table), list(table.values()), shapes))

    def get(self, fqn: str) -> Tensor:
        table, name = self._places[fqn]
        return table[name]

    def check(self) -> None:
        """Raises ShardingError where a parameter or submodule was added, removed or replaced since compile."""
        for (table, names, values, shapes), (prefix, _, before) in zip(self._seen, self._tables, strict=True):
            if not table and not names:
                continue
            if [*table] == names and not any(map(_differs, table.values(), values, shapes)):
                continue  # the very same objects: this is looked at in every call
            now = _outline(table)
            if now != before:
                changed = [n for n in {**before, **now} if n not in now or n not in before or now[n] != before[n]]
                names = ", ".join(f"{prefix}.{n}".lstrip(".") for n in changed)
                raise ShardingError(
                    f"the module changed after compile: {names}",
                    where=call_site(),
                    help="add parameters (adapters, LoRA) before compile, so that they are laid out and reduced",
                )


def _differs(now: Any, before: Any, shape: Any) -> bool:
    return now is not before or (shape is not None and now.shape != shape)


def _outline(table: dict[str, Any]) -> dict[str, Any]:
    """What must stay as it is: a submodule itself, and of a parameter its kind and global shape."""
    return {name: (type(x), x.shape) if isinstance(x, Tensor) else x for name, x in table.items()}
