"""A whole training step: loss, gradients, reductions and the optimizer, on plain local tensors.

The loss function is compiled together with the model, so the loss is the global one. The program's two halves run
without autograd, and the optimizer steps on each rank's own shards: nothing is dispatched on a distributed tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx import Node

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.compile import compile
from shardc.compiler.driver.compiled_module import CompiledModule
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.ir.graph import returned
from shardc.compiler.ir.node import shape
from shardc.compiler.ir.signature import InputKind, OutputKind
from shardc.compiler.plan.annotate import annotate_alike
from shardc.compiler.plan.layout import bad_option, shown
from shardc.compiler.proof.optimizer_pieces import looks_at_the_whole
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.user_code import call_site
from shardc.runtime.checkpoint.optimizers import COUNT

LossFn = Callable[..., Tensor]
Factory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def train_step(
    model: nn.Module,
    plan: Any,
    loss_fn: LossFn,
    optimizer: Factory,
    *,
    mesh: DeviceMesh | Mesh | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    **options: Any,
) -> TrainStep:
    """One call does forward, loss, backward, reductions and an optimizer step.

    loss_fn: `loss_fn(model, *batch)` returns the scalar loss of the (global) batch: `lambda model, x, y:
    F.cross_entropy(model(x), y)`. optimizer: makes a torch.optim optimizer from a list of parameters:
    `functools.partial(torch.optim.AdamW, lr=1e-3)`. accumulate: the batch is cut into so many equal parts along dim
    0, computed one after another, their losses averaged and their gradients reduced once. clip_norm: gradients are
    scaled so that their 2-norm as one vector is at most this. mesh, options: `compile`'s.

    Raises what `compile` raises; ShardingError at the first call where loss_fn does not return a scalar that depends
    on a parameter.
    """
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise bad_option("accumulate", accumulate, "a positive integer").at(call_site())
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
        raise bad_option("clip_norm", clip_norm, "a number above zero, or None").at(call_site())
    if not callable(optimizer):
        made = isinstance(optimizer, torch.optim.Optimizer)
        help = "pass what makes one: functools.partial(torch.optim.AdamW, lr=1e-3)"
        what = "an optimizer that is made already" if made else shown(optimizer)
        raise PlanError(f"optimizer is {what}; train_step makes it, of the shards", where=call_site(), help=help)
    compiled = compile(_WithLoss(model, loss_fn), plan, mesh=mesh, **options)
    return TrainStep(compiled, model, optimizer, accumulate, clip_norm)


class _WithLoss(nn.Module):
    """The model's own tables of modules, parameters and buffers, so under the same names, with a loss for forward."""

    _model: nn.Module
    _loss_fn: LossFn

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        mode = model.training
        self.__dict__["_model"], self.__dict__["_loss_fn"] = model, loss_fn
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = mode  # pyright: ignore[reportIncompatibleVariableOverride]
        annotate_alike(self, model)

    @property
    def training(self) -> bool:
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._model.training = mode

    def forward(self, *batch: Any) -> Tensor:
        return self._loss_fn(self._model, *batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.load_state_dict(*args, **kwargs)


class TrainStep:
    """`loss = step(*batch)`: on real ranks each passes its own part of the batch; every rank gets the whole loss.

    model: the one given, holding its shards. optimizer: of this rank's local tensors, in the order of
    `model.parameters()`; learning rates may be changed in its groups. steps: how many were made.
    """

    def __init__(
        self,
        compiled: CompiledModule,
        model: nn.Module,
        optimizer: Factory,
        accumulate: int,
        clip_norm: float | None,
    ) -> None:
        self._compiled, self._accumulate, self._clip_norm = compiled, accumulate, clip_norm
        self.model, self.steps = model, 0
        self._held = dict(compiled.named_parameters())
        self._local = {fqn: _local_parameter(p) for fqn, p in self._held.items()}
        _check_pieces(optimizer, self._held, compiled._bound.in_pieces)
        self.optimizer = optimizer(list(self._local.values()))
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise PlanError(
                f"{type(self.optimizer).__name__} needs a closure that computes the loss several times a step",
                where=call_site(),
                help="use compile, and optimizer.step(closure) with loss and backward in the closure",
            )
        compiled._bound.follow(self._moved)

    def _moved(self, held: nn.Parameter, move: Callable[[Tensor], Tensor]) -> None:
        """State that was loaded before the first program goes where that one puts its parameter."""
        local = next(self._local[name] for name, p in self._held.items() if p is held)
        state = self.optimizer.state.get(local, {})
        state.update({key: move(value) for key, value in state.items() if _is_like(key, value, local)})

    def _look(self) -> None:
        """Parameters that were on meta are other objects once they are loaded; the optimizer's stay the same."""
        if not any(p.is_meta for p in self._held.values()):
            return
        for name, p in self._compiled.named_parameters():
            if p is not self._held[name]:
                self._held[name] = p
                made = nn.Parameter(_local(p).detach(), p.requires_grad)  # of its memory; p stays the module's own
                torch.utils.swap_tensors(self._local[name], made)

    def __call__(self, *batch: Any) -> Tensor:
        """The loss before the step. Raises PlanError where the batch cannot be cut into `accumulate` equal parts."""
        parts = _parts(batch, self._accumulate)
        self._look()
        with self._compiled._bound.lowering.kept.undone_by_errors():
            losses, totals = self._accumulated(parts)
        if self._clip_norm is not None:
            self._compiled._bound.clip({name: totals.get(name) for name in self._local}, self._clip_norm, 2.0)
        for name, parameter in self._local.items():
            parameter.data = _local(self._held[name])  # laid out anew by the first program, or moved by `to`
            parameter.grad = totals.get(name)
        self.optimizer.step()
        for parameter in self._local.values():
            parameter.grad = None
        self.steps += 1
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _accumulated(self, parts: Sequence[Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The loss of each part, and the reduced gradients of their mean."""
        losses, totals = [], dict[str, Tensor]()
        for i, part in enumerate(parts, 1):
            with nullcontext() if i == len(parts) else self._compiled.no_sync():
                loss, gradients = self._gradients(part)
            losses.append(loss)
            for name, gradient in gradients.items():
                totals[name] = totals[name] + gradient if name in totals else gradient
        return losses, totals

    def lower(self, *batch: Any) -> Program:
        """Compile for a batch like this ahead of time, from real, fake or meta tensors."""
        return self._checked(self._compiled.lower(*_parts(batch, self._accumulate)[0]))

    @property
    def programs(self) -> list[Program]:
        """Every compiled program, newest last: forward, loss and backward."""
        return self._compiled.programs

    def _gradients(self, batch: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss, local gradients by parameter), what was kept back of reductions included."""
        with torch.enable_grad():
            entry, flat = self._compiled._bound.prepared(batch, {})
        signature = self._checked(entry.program).signature
        found, saved = entry.run.halfway(flat)
        values, loss = found[: len(entry.there)], found[0].detach()
        self._compiled._bound.mutate(entry, flat, found[len(entry.there) :])
        self._compiled._bound.affect(entry, [v for v in values if v is not None], (batch, {}))
        ends = [signature.inputs[i].of or 0 for i in signature.indices(InputKind.TANGENT)]
        tangents = [torch.full_like(values[i], 0 if i else 1 / self._accumulate) for i in ends]
        gradients = entry.run.gradients(saved, tangents)
        sources = [signature.inputs[signature.outputs[i].of or 0] for i in signature.indices(OutputKind.GRADIENT)]
        pairs = zip(sources, gradients, strict=True)
        return loss, {s.name: _local(g) for s, g in pairs if g is not None and s.kind is InputKind.PARAMETER}

    def _checked(self, program: Program) -> Program:
        ends = [node for node in returned(program.gm)[:1] if isinstance(node, Node)]
        if program.signature.out_spec.num_leaves != 1 or not ends or shape(ends[0]) != ():
            raise ShardingError(
                "loss_fn does not return one scalar tensor", where=call_site(), help="reduce it: .mean(), or .sum()"
            )
        if not program.signature.indices(InputKind.TANGENT):
            raise ShardingError(
                "the loss depends on no parameter that requires grad",
                where=call_site(),
                help="loss_fn(model, *batch) must call the model it is given, without no_grad",
            )
        return program

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under "model", per-parameter optimizer state by FQN, its groups, and the count of
        steps. What is sharded is a DTensor that shares memory with the live state."""
        state, groups = self.optimizer_state(), self.optimizer_groups()
        return {"model": self._compiled.state_dict(), "optimizer": state, "groups": groups, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of this layout or another one, or with whole tensors; in place.

        Raises PlanError where it holds optimizer state for parameters that the model does not have.
        """
        strange = [fqn for fqn in state["optimizer"] if fqn not in self._local]
        if strange or len(state["groups"]) != len(self.optimizer.param_groups):
            what = f"the state of {', '.join(strange)}" if strange else f"{len(state['groups'])} parameter groups"
            raise PlanError(f"the optimizer has no place for {what}", help="load what an equal step has saved")
        self._compiled.load_state_dict(state["model"])
        self.put_optimizer(state["optimizer"], state["groups"], state["steps"])

    # What checkpoints ask for and give:

    @property
    def module(self) -> CompiledModule:
        """The compiled model, with the loss."""
        return self._compiled

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The parameters by name, as they are laid out, or will be once they are loaded."""
        return {name: self._compiled.room_like(name) if p.is_meta else p for name, p in self._held.items()}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """By parameter; what is sharded is a DTensor that shares memory with the live state."""
        return {
            fqn: {key: self._labelled(fqn, key, value) for key, value in self.optimizer.state[p].items()}
            for fqn, p in self._local.items()
            if p in self.optimizer.state
        }

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """As in the optimizer, with the names of the parameters."""
        names = {id(p): fqn for fqn, p in self._local.items()}
        return [{**g, "params": [names[id(p)] for p in g["params"]]} for g in self.optimizer.param_groups]

    def put_optimizer(self, state: Mapping[str, Mapping[str, Any]], groups: Sequence[Any], steps: int) -> None:
        """What the two above gave, of any layout, or with whole tensors; what `state` lacks has none."""
        self._look()
        self.optimizer.state.clear()
        for fqn, values in state.items():
            held = {key: self._placed(fqn, key, value) for key, value in values.items()}
            self.optimizer.state[self._local[fqn]] = held
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
        self.steps = steps

    def _labelled(self, fqn: str, key: str, value: Any) -> Any:
        held = self._held[fqn]
        if not isinstance(held, DTensor) or not _is_like(key, value, self._local[fqn]):
            return value
        return self._compiled._bound.labelled(fqn, value)

    def _placed(self, fqn: str, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        held = self._held[fqn]
        placed = self._compiled._bound.placed(fqn, value, held) if _is_like(key, value, held) else value
        return _local(placed).detach().clone()


def _check_pieces(make: Factory, held: Mapping[str, Tensor], in_pieces: Collection[str]) -> None:
    """Raises PlanError where the optimizer needs whole parameters, and ranks hold pieces of them."""
    found = zip(held, looks_at_the_whole(make, list(held.values())) if in_pieces else (), strict=False)
    wrong = [fqn for fqn, whole in found if whole and fqn in in_pieces]
    if wrong:
        raise PlanError(
            "the optimizer does not step on pieces of a parameter as on the whole, and ranks hold pieces of "
            + ", ".join(wrong),
            where=call_site(),
            help="keep them whole: Replicated(), FullyShard(ignored_params=...), or another optimizer for them",
        )


def _is_like(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether a value of an optimizer's state has an element for each of the parameter."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and key != COUNT


def _local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, without a dispatch."""
    return getattr(x, "_local_tensor", x)


def _local_parameter(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_local(p).detach(), p.requires_grad) if isinstance(p, DTensor) else p


def _parts(batch: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """The batch in equal parts along dim 0 of its tensors; 0-d tensors and other values go into each."""
    if count == 1:
        return [tuple(batch)]
    leaves, structure = pytree.tree_flatten(tuple(batch))
    rows = {x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()}
    if any(n % count for n in rows):
        raise PlanError(
            f"a batch of {', '.join(map(str, sorted(rows)))} rows is not {count} equal parts",
            where=call_site(),
            help=f"accumulate={count} cuts dim 0 of each tensor; give it a multiple of {count}",
        )
    cut = [x.chunk(count) if isinstance(x, Tensor) and x.dim() else [x] * count for x in leaves]
    return [pytree.tree_unflatten([pieces[i] for pieces in cut], structure) for i in range(count)]
