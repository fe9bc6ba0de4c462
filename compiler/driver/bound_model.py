"""A model bound to its plan and its ranks: what a call runs, and how its tensors are held."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shardc.compiler.driver.calls.program_cache import Entry
from shardc.compiler.driver.calls.same_values import check_replicas
from shardc.compiler.driver.fill import Filling
from shardc.compiler.driver.kept_gradients import ALL, Sync
from shardc.compiler.driver.lowering import Lowering
from shardc.compiler.errors import CheckpointError, PlanError, ShardingError
from shardc.compiler.ir.signature import InputKind
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.spec import Spec
from shardc.compiler.user_code import call_site, frame_of
from shardc.runtime.shards import cut
from shardc.runtime.values.deferred import tensors
from shardc.runtime.values.spread import Spread
from shardc.runtime.wire.distribute import as_dtensor, as_held, local_of, whole
from shardc.runtime.wire.norms import Piece, scale, total_norm

Lower = Callable[[nn.Module, Resolved], Lowering]


class BoundModel:
    """`model` is the one that compile took over, seen as an object of the class it had: it is what is traced.

    lower: what makes a lowering of a model by a resolved plan, the rest of compile's options in it.
    """

    def __init__(self, model: nn.Module, plan: Resolved, lower: Lower) -> None:
        self.model = object.__new__(type(model))
        self.model.__dict__ = model.__dict__
        self._lower = lower
        self.lowering = lower(self.model, plan)
        self._unsynced: tuple[str, ...] = ()
        self._pieces: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._tables = _Tables(self.model)
        self._on_meta = bool(_on_meta(self.model))

    def copy(self, memo: dict[int, Any]) -> nn.Module:
        """The model alone, copied with all it holds."""
        return copy.deepcopy(self.model, memo)

    def like(self, model: nn.Module) -> BoundModel:
        """Another model, held as this one is, bound to the same plan and ranks."""
        return BoundModel(model, self.lowering.plan, self._lower)

    def __reduce__(self) -> Any:
        if self.lowering.ranks is not None:
            raise pickle.PicklingError(
                "a module compiled for a DeviceMesh holds its process groups, which are this process's alone: "
                "save its state_dict(), or use shardc.save_checkpoint"
            )
        return BoundModel, (self.model, self.lowering.plan, self._lower)

    # ---- calling

    def __call__(self, args: Any, kwargs: Any) -> Any:
        entry, flat = self.prepared(args, kwargs)
        outputs, mutations = entry.run(flat)
        self.mutate(entry, flat, mutations)
        values = [v for v, there in zip(outputs, entry.there, strict=True) if there]
        self.affect(entry, values, (args, kwargs))
        return entry.result(values)

    def affect(self, entry: Entry, values: list[Any], call: Any) -> None:
        """Set what forward sets beside tensors."""
        if entry.effects:
            entry.program.signature.apply_effects(values, call)
            pieces = entry.pieces if self.lowering.ranks is not None else []
            effected = values[len(values) - len(pieces) :]
            self._pieces.update((id(x), x) for x, piece in zip(effected, pieces, strict=True) if piece)

    def prepared(self, args: Any, kwargs: Any) -> tuple[Entry, list[Any]]:
        """The program for a call that is about to run, and its inputs in signature order."""
        if self._on_meta:
            self._check_loaded()
        self._tables.check()
        self._check_unwrapped()
        device = self.lowering.plan.device_id
        if device is not None:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        entry = self.lowering.serve(args, kwargs, self._sync())
        return entry, self._flat(entry, args, kwargs)

    def _flat(self, entry: Entry, args: Any, kwargs: Any) -> list[Any]:
        signature = entry.program.signature
        plain = entry.plain and not kwargs and all(isinstance(x, Tensor) for x in args)
        given = args if plain else signature.flatten_inputs(args, kwargs)
        rest, flat = (local_of(x) if x.requires_grad else x for x in given), []
        for item in signature.inputs:
            if item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                flat.append(self._tables.get(item.name))
            elif item.kind is InputKind.CONSTANT:
                if id(item.value) in self._pieces:
                    raise _is_piece(item.name)
                flat.append(item.value)
            elif item.kind is InputKind.BATCH:
                flat.append(next(rest))
        return flat

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
        return {fqn for fqn, layout in self.lowering.plan.params.items() if not layout.stored.is_whole}

    # ---- gradients

    def _check_unwrapped(self) -> None:
        """Raises PlanError where the call comes through a wrapper that reduces these gradients too."""
        if self.lowering.ranks is None or not torch.is_grad_enabled():
            return
        frame = frame_of(DistributedDataParallel.forward.__code__)
        if frame is None:
            return
        wrapper = frame.f_locals["self"]
        own = {id(x) for x in self.model.parameters() if x.requires_grad}
        named = wrapper.module.named_parameters()
        twice = [name for name, x in named if id(x) in own and name not in wrapper.parameters_to_ignore]
        if twice:
            help = f"compile the whole, or wrap only what holds no {twice[0]}"
            raise wrapped_again("a module that holds a compiled one", help)

    @contextmanager
    def keeping(self, names: Collection[str]) -> Iterator[None]:
        """The gradients of these parameters are not reduced within."""
        before = self._unsynced
        self._unsynced = tuple(n for n in self.lowering.plan.params if n in before or n in names)
        try:
            yield
        finally:
            self._unsynced = before

    def check_all_reduced(self) -> None:
        """Raises ShardingError while gradients of unsynchronised steps are kept back."""
        if self.lowering.kept.layouts():
            raise ShardingError(
                "gradients of unsynchronised steps are not reduced yet, so their norm is not known",
                where=call_site(),
                help="run a synchronised backward, outside of no_sync(), before clip_grad_norm_",
            )

    def clip(self, gradients: Mapping[str, Tensor | None], max_norm: float, p: float) -> Tensor:
        """`clip_grad_norm_` of these gradients, local or distributed, by parameter; all parameters have an entry."""
        device = next((x.device for x in self.model.parameters()), torch.device("cpu"))
        ranks = self.lowering.ranks
        pieces = [Piece(x if x is None else local_of(x), self._split_over(name)) for name, x in gradients.items()]
        with ranks.together("clip_grad_norm_") if ranks is not None else nullcontext():
            norm = total_norm(pieces, p, ranks.lines if ranks is not None else {}, device)
        dtypes = [piece.gradient.dtype.to_real() for piece in pieces if piece.gradient is not None]
        norm = norm.to(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))
        scale([piece.gradient for piece in pieces if piece.gradient is not None], norm, max_norm)
        return norm

    def _split_over(self, name: str) -> tuple[str, ...]:
        """The mesh dims along which ranks have different gradients of a parameter."""
        layout = self.lowering.plan.layout(name)
        return tuple(a for a in self.lowering.mesh.names if layout and a in (*layout.stored.axes(), *layout.local))

    def _sync(self) -> Sync:
        if self.lowering.ranks is None or not torch.is_grad_enabled():
            return ALL  # simulated ranks: a kept sum and a reduced one are the same global tensor
        keep = self._unsynced
        return Sync(keep, tuple(carry for carry in self.lowering.kept.layouts() if carry[0] not in keep))

    # ---- state

    def check_replicas(self) -> None:
        """Compare what ranks must hold alike; see `same_values.check_replicas`."""
        if self.lowering.ranks is not None:
            check_replicas(tensors(self.model), self._split_over, self.lowering.ranks)

    def placed_all(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict laid out as the model is, which has room for it afterwards."""
        held = tensors(self.model)
        self._allocate([key for key, x in state_dict.items() if key in held and x.shape == held[key].shape])
        if self.lowering.ranks is None:
            return state_dict
        live = tensors(self.model)
        return {key: self.placed(key, value, live[key]) if key in live else value for key, value in state_dict.items()}

    def full_state_dict(self, state: Mapping[str, Tensor], rank0_only: bool) -> dict[str, Tensor]:
        """Whole tensors for the model's own state dict."""
        ranks = self.lowering.ranks
        keeps = not rank0_only or ranks is None or not any(ranks.coords.values())
        found = {}
        with ranks.together("full_state_dict") if ranks is not None else nullcontext():
            for key, x in state.items():
                value = whole(x)
                if keeps:
                    found[key] = value
        return found

    def load_full_state_dict(self, state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Load what the first rank is given; `state` is the model's own."""
        ranks = self.lowering.ranks
        groups: dict[int, list[str]] = {}
        for key, x in state.items():
            groups.setdefault(id(x), []).append(key)
        spread = Spread([(keys, state[keys[0]]) for keys in groups.values()], list(state), ranks, 0)
        spread.look(lambda: given)
        if spread.missing:
            raise CheckpointError(f"no values for: {', '.join(spread.missing)}", help="nothing was loaded")
        self._allocate(state)
        live = tensors(self.model)
        for keys, value in spread.whole():
            held = live[keys[0]]
            piece = cut(value, self._stored(keys[0]), ranks.mesh, ranks.coords) if ranks is not None else value
            with torch.no_grad():
                local_of(held).copy_(piece)

    def allocate_all(self) -> None:
        """Make room for whatever is still on meta."""
        self._allocate(tensors(self.model))

    def _allocate(self, names: Collection[str]) -> None:
        """Make room for what is still on meta, and about to be loaded."""
        if not self._on_meta:
            return
        self._filling().allocate(names)
        self._tables = _Tables(self.model)
        self._on_meta = bool(_on_meta(self.model))

    def _filling(self) -> Filling:
        return Filling(self.model, self.lowering.plan, self.lowering.ranks, None)

    def room_like(self, name: str) -> Tensor:
        """New memory in the layout that this rank holds a parameter or buffer in, or will once it is loaded."""
        x = tensors(self.model)[name]
        return self._filling().room(name, x).detach() if x.is_meta else torch.empty_like(x.detach())

    def _check_loaded(self) -> None:
        missing = _on_meta(self.model)
        self._on_meta = bool(missing)
        if missing:
            raise PlanError(
                f"still on meta, without values: {', '.join(missing)}",
                where=call_site(),
                help="load them (load_state_dict, load_checkpoint) before the first call",
            )

    def placed(self, key: str, value: Tensor, held: Tensor) -> Tensor:
        """A whole tensor or a DTensor, laid out as the parameter or buffer `held` of this name."""
        ranks = self.lowering.ranks
        if ranks is None:
            return whole(value)
        return as_held(value, held, self._stored(key), ranks.device_mesh, ranks.coords)

    def labelled(self, key: str, local: Tensor) -> Tensor:
        """A local tensor of a sharded parameter's local shape, under the parameter's global layout."""
        ranks = self.lowering.ranks
        return local if ranks is None else as_dtensor(local, self._stored(key), ranks.device_mesh)

    def _stored(self, key: str) -> Spec:
        return self.lowering.plan.stored(key, self._tables.get(key).shape)

    def follow(self, follower: Callable[[nn.Parameter, Callable[[Tensor], Tensor]], None]) -> None:
        """Have a function called for each parameter that the first program stores in another layout, with what
        moves local tensors that are laid out as the parameter was. Of what several hold, all ranks move theirs."""
        self.lowering.followers.append(follower)


def wrapped_again(what: str, help: str) -> PlanError:
    return PlanError(
        f"{what} is wrapped in DistributedDataParallel, which would average its gradients once more",
        where=call_site(),
        help=help,
    )


def _is_piece(name: str) -> ShardingError:
    return ShardingError(
        f"forward reads {name}, which it set in an earlier call, and which is this rank's part of a batch",
        where=call_site(),
        help="pass it to forward as an argument and return it",
    )


def _on_meta(model: nn.Module) -> list[str]:
    return [name for name, x in tensors(model).items() if x.is_meta]


class _Tables:
    """Where each parameter and buffer lives, to fetch them at every call and to notice strangers."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._tables: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        for prefix, module in model.named_modules(remove_duplicate=False):
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None:
                        self._places[f"{prefix}.{name}" if prefix else name] = (table, name)
            self._tables += [(prefix, table, _outline(table)) for table in (module._parameters, module._modules)]
        self._all = [table for _, table, _ in self._tables]
        self._remember()

    def _remember(self) -> None:
        self._names, self._values = self._now()
        self._shapes = [(x, x.shape) for x in self._values if isinstance(x, Tensor)]
        held = [(name, self.get(name)) for name in self._places]
        self._memory = [(n, x, x.untyped_storage(), ref(_part(x))) for n, x in held if isinstance(x, DTensor)]

    def _now(self) -> tuple[list[str], list[Any]]:
        return [*chain.from_iterable(self._all)], [*chain.from_iterable([table.values() for table in self._all])]

    def get(self, fqn: str) -> Tensor:
        table, name = self._places[fqn]
        return table[name]

    def check(self) -> None:
        """Raises ShardingError where a parameter or submodule was added, removed or replaced since compile."""
        names, values = self._now()
        if len(values) == len(self._values) and all(map(is_, values, self._values)) and names == self._names:
            if all([x.shape == shape for x, shape in self._shapes]):
                if any([x.untyped_storage() is not memory for _, x, memory, _ in self._memory]):
                    self._check_data()
                return  # the very same objects: this is looked at in every call
        for prefix, table, before in self._tables:
            now = _outline(table)
            if now != before:
                changed = [n for n in {**before, **now} if n not in now or n not in before or now[n] != before[n]]
                raise ShardingError(
                    f"the module changed after compile: {', '.join(f'{prefix}.{n}'.lstrip('.') for n in changed)}",
                    where=call_site(),
                    help="add parameters (adapters, LoRA) before compile, so that they are laid out and reduced",
                )
        self._check_data()

    def _check_data(self) -> None:
        """Raises ShardingError for a DTensor whose data was assigned: its local tensor stays what it was. One that
        moved, by `to` or swap_tensors, has another."""
        for name, x, memory, local in self._memory:
            if x.untyped_storage() is not memory and _part(x) is local():
                raise ShardingError(
                    f"{name}.data was assigned, which torch does not do for what is held as a DTensor",
                    where=call_site(),
                    help="write into it: with torch.no_grad(): parameter.copy_(value)",
                )
        self._remember()


def _part(x: DTensor) -> Tensor:
    """The very tensor that a DTensor holds; `to_local` makes another of its memory."""
    return getattr(x, "_local_tensor", x)


def _outline(table: dict[str, Any]) -> dict[str, Any]:
    """What must stay as it is: a submodule itself, and of a parameter its kind and global shape."""
    return {name: (type(x), x.shape) if isinstance(x, Tensor) else x for name, x in table.items()}
