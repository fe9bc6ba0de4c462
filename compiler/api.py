"""compile: the one way in. Resolves the plan, takes the module over, and returns what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardc.compiler.compiled import CompiledModule
from shardc.compiler.errors import PlanError
from shardc.compiler.layout import Precision
from shardc.compiler.lowering import Lowering, held
from shardc.compiler.mesh import Mesh
from shardc.compiler.program import Program
from shardc.compiler.resolve import mesh_dims, resolve
from shardc.compiler.resolved import Resolved
from shardc.runtime.groups import default_device_mesh
from shardc.runtime.ranks import Ranks
from shardc.runtime.state import broadcast, shard_parameter, whole

_COMPILED: WeakSet[nn.Module] = WeakSet()  # modules that some compile has taken over


def compile(
    model: nn.Module,
    plan: Any = None,
    *,
    mesh: DeviceMesh | Mesh | None = None,
    inputs: Any = None,
    outputs: Any = None,
    init: Any = None,
    src_data_rank: int | None = 0,
    precision: Precision | None = None,
    recompute: str | Sequence[str] | None = None,
    rng: str = "counter",
    backend: str | Callable[..., Any] = "eager",
    dynamic: bool = False,
    strict: bool = False,
) -> CompiledModule:
    """Shard a model over a mesh by a plan. The model is taken over in place: its parameters become the shards.

    model: an nn.Module. plan: a `Plan`, a dict of patterns -> styles for the only mesh dim, a style for the
    root, or None for the module's own annotations. mesh: a torch DeviceMesh (real ranks), or a `shardc.Mesh`
    (all ranks simulated in this process; global tensors in and out). inputs, outputs: layouts of the root's
    inputs and outputs. src_data_rank: whose values win; None: each rank slices its own. recompute: patterns of
    modules whose activations are computed again in backward. strict: errors instead of reports.

    Raises PlanError for a plan, mesh or option that makes no sense, before any collective; ShardingError, at
    the first call or `lower`, for a module that cannot be traced or sharded so.
    """
    _check_options(model, precision, rng, backend, dynamic, init)
    if model in _COMPILED:
        raise PlanError("this module is compiled already", help="keep what the first compile returned and call that")
    integers, device_mesh = _mesh(mesh, plan, model)
    resolved = resolve(plan, model, integers, inputs=inputs, outputs=outputs, strict=strict)
    _refuse_meta(model)
    ranks = Ranks(device_mesh) if device_mesh is not None else None
    if ranks is not None:
        _take_over(model, resolved, ranks, src_data_rank)
    _COMPILED.add(model)
    patterns = (recompute,) if isinstance(recompute, str) else tuple(recompute or ())
    lowering = Lowering(model, resolved, integers, ranks, lambda: _whole_values(model), strict, patterns)
    return CompiledModule(model, lowering)


def _check_options(model: Any, precision: Any, rng: Any, backend: Any, dynamic: bool, init: Any) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(f"compile takes an nn.Module, not {type(model).__name__}")
    if rng not in ("counter", "replay"):
        raise PlanError(f"rng={rng!r}", help='write rng="counter" or rng="replay"')
    unsupported = {
        "precision": precision is not None,
        "backend": backend != "eager",
        "dynamic": dynamic is not False,
        "init": init is not None,
    }
    for name, used in unsupported.items():
        if used:
            raise PlanError(f"this version of shardc does not take {name}=", help=f"leave {name} out")


def _mesh(mesh: Any, plan: Any, model: nn.Module) -> tuple[Mesh, DeviceMesh | None]:
    """The mesh as integers, and the real one if there is one."""
    if isinstance(mesh, Mesh):
        return mesh, None
    if mesh is None:
        names = mesh_dims(plan, model) or ("tp",)
        mesh = default_device_mesh(names)
        if mesh is None:
            return Mesh(**{names[0]: 1}), None
    if not isinstance(mesh, DeviceMesh):
        raise PlanError(
            f"mesh is {type(mesh).__name__}",
            help="pass a torch DeviceMesh (init_device_mesh) or shardc.Mesh(dp=2, tp=2)",
        )
    return Mesh.of(mesh), mesh


def _refuse_meta(model: nn.Module) -> None:
    missing = [name for name, x in held(model).items() if x.is_meta]
    if missing:
        raise PlanError(
            f"parameters or buffers are on meta: {', '.join(missing)}",
            help="give them values before compile (to_empty and an init function)",
        )


def _take_over(model: nn.Module, plan: Resolved, ranks: Ranks, source: int | None) -> None:
    """Give every rank the source's values, then leave it its shards. Tied parameters stay one object."""
    made: dict[int, nn.Parameter] = {}
    for fqn, x in held(model).items():
        if id(x) in made:
            _put(model, fqn, made[id(x)])
            continue
        if source is not None and x.numel():
            with torch.no_grad():
                broadcast(x.data, ranks.device_mesh, source)
        if isinstance(x, nn.Parameter):
            made[id(x)] = _held_by(x, plan, fqn, ranks)
            _put(model, fqn, made[id(x)])


def _held_by(x: nn.Parameter, plan: Resolved, fqn: str, ranks: Ranks) -> nn.Parameter:
    spec = plan.params[plan.canonical(fqn)].stored_spec(ranks.mesh)
    return x if spec.is_whole else shard_parameter(x, spec, ranks.device_mesh, ranks.coords)


def _put(model: nn.Module, fqn: str, param: nn.Parameter) -> None:
    owner, _, name = fqn.rpartition(".")
    model.get_submodule(owner)._parameters[name] = param


def _whole_values(model: nn.Module) -> Mapping[str, Tensor]:
    return {fqn: whole(x) for fqn, x in held(model).items()}


__all__ = ["CompiledModule", "Program", "compile"]
