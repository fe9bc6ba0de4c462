"""The module that compile returns: the very model that was given, of a class that calls its programs."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.bound_model import BoundModel, wrapped_again
from shardc.compiler.errors import PlanError
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.user_code import call_site


class CompiledModule(nn.Module):
    """A model bound to a plan and a mesh. Its class derives from the one it had, its attributes are what they were."""

    _bound: ClassVar[BoundModel]

    # ---- calling

    @torch.compiler.disable(reason="a module that shardc compiled is a program already")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program's results. Hooks of the model are in the program, so none is called here."""
        return self._bound(args, kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Program:
        """Compile for inputs like these ahead of time, from real, fake or meta tensors."""
        return self._bound.lowering.entry(args, kwargs).program

    def no_sync(self, *units: str) -> AbstractContextManager[None]:
        """Leave data-parallel reductions out; the next synchronised backward makes them up, at once.

        units: patterns of the gather units ("" is the root's own) whose gradients stay back, the others being
        reduced; none means all. Outside of FullyShard, where there are no units, a module means all that it holds.
        Raises PlanError for a pattern that matches none.
        """
        plan = self._bound.lowering.plan
        try:
            return self._bound.keeping(plan.of_units(units) if units else tuple(plan.params))
        except PlanError as error:
            raise error.at(call_site()) from None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any module; gradients kept at unsynchronised steps are forgotten too."""
        super().zero_grad(set_to_none)
        self._bound.lowering.kept.clear()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients, in place, so that their norm as one vector is at most `max_norm`. All ranks call it.

        norm_type: any p above zero, or inf. What several ranks hold alike counts once; gradients that stay local
        (ignored parameters) count on every rank. Returns the norm before, the same on every rank. Raises
        ValueError for another norm_type, ShardingError while gradients of unsynchronised steps are kept back.
        """
        p = float(norm_type)
        if not p > 0:
            raise ValueError(f"norm_type is {norm_type}: it is a number above zero, or inf")
        self._bound.check_all_reduced()
        return self._bound.clip({name: x.grad for name, x in self.named_parameters()}, max_norm, p)

    # ---- state

    def check_replicas(self) -> None:
        """Compare parameters and buffers, bit by bit, among the ranks that hold the same part. All ranks call it.

        Raises RankMismatchError, on every rank, with the first tensor that differs: weights that one rank loaded or
        edited, another learning rate, a step that one rank missed. Reads every local byte once.
        """
        self._bound.check_replicas()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors or shards, in place; every rank passes the same whole tensors."""
        return super().load_state_dict(self._bound.placed_all(state_dict), strict, assign)

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Whole tensors on every rank; with rank0_only an empty dict on the others. All ranks must call it."""
        return self._bound.full_state_dict(self.state_dict(), rank0_only)

    def load_full_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the whole tensors that the first rank passes; what others pass is not looked at. All ranks must call it.

        Raises CheckpointError, on every rank and before anything is loaded, for names and shapes that do not fit.
        """
        self._bound.load_full_state_dict(self.state_dict(keep_vars=True), state_dict)

    def to_empty(self, *, device: Any, recurse: bool = True) -> CompiledModule:
        """As of any module; what is on meta gets memory for this rank's shard of it."""
        self._bound.allocate_all()
        return super().to_empty(device=device, recurse=recurse)

    def room_like(self, name: str) -> Tensor:
        """New memory in the layout that this rank holds a parameter or buffer in, or will once it is loaded."""
        return self._bound.room_like(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A model of its own, compiled for the same plan and mesh."""
        twin = memo[id(self)] = self._bound.copy(memo)
        return twin if isinstance(twin, CompiledModule) else bind(twin, self._bound.like(twin))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return bind, (self._bound.model, self._bound)

    # ---- what was compiled

    @property
    def programs(self) -> list[Program]:
        """Every compiled program, newest last."""
        return self._bound.lowering.programs

    def save_programs(self, path: str | os.PathLike[str]) -> None:
        """Write what was traced so far to a file, as JSON: a process that loads it need not trace. Parameters are
        not in it. A compile over a fake process group, or for an abstract mesh, will do to make one.

        Raises ShardingError for a program that calls what has no name (a higher-order operator), or whose inputs or
        results are of a container type that has none.
        """
        self._bound.lowering.save(path)

    def load_programs(self, path: str | os.PathLike[str]) -> None:
        """Take in what `save_programs` wrote; calls of that form are then served without tracing.

        Raises PlanError, naming the difference, where it was saved for another mesh, plan, module, option or
        version, or is damaged; OSError where there is no such file.
        """
        self._bound.lowering.load(path)

    @property
    def plan(self) -> Resolved:
        """The plan as resolved: `print(compiled.plan.report())`."""
        return self._bound.lowering.plan

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> NoReturn:
        """Asked for by DistributedDataParallel, and so by all who wrap in it, before they do anything."""
        help = "call the compiled module itself: it reduces its gradients over the mesh it was compiled for"
        raise wrapped_again("a compiled module", help)


_COMPILED: WeakSet[nn.Module] = WeakSet()  # modules that some compile has taken over


def is_compiled(module: nn.Module) -> bool:
    """Whether it is part of a compiled model."""
    return module in _COMPILED


def bind(model: nn.Module, bound: BoundModel) -> CompiledModule:
    """The model itself, from here on of a class of its own that calls what it is bound to."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    about: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    if not hasattr(model, "_model"):
        about["_model"] = property(lambda self: self)  # what compile was given, to those who look for it inside
    bases = (CompiledModule,) if kind is nn.Module else (CompiledModule, kind)
    model.__class__ = type(kind)(kind.__name__, bases, {**about, "_bound": bound, "forward": forward})  # pyright: ignore
    assert isinstance(model, CompiledModule)
    _COMPILED.update(model.modules())
    return model
