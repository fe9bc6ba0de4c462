"""compile: the one way in. Resolves the plan, takes the module over, and returns what runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardc.compiler.analysis.program import Program
from shardc.compiler.driver.bound_model import BoundModel
from shardc.compiler.driver.compiled_module import CompiledModule, bind, is_compiled
from shardc.compiler.driver.decide import Options
from shardc.compiler.driver.fill import Filling, check_init
from shardc.compiler.driver.lowering import Lowering, Planned
from shardc.compiler.driver.precision import with_precision
from shardc.compiler.driver.search.search import planned
from shardc.compiler.errors import PlanError
from shardc.compiler.plan.layout import Precision, bad_option, shown
from shardc.compiler.plan.match import did_you_mean, find
from shardc.compiler.plan.resolve import check_placements, mesh_dims, resolve
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.hardware import Hardware
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.user_code import call_site, warn_user
from shardc.passes.pipeline import OPTIONAL
from shardc.runtime.run.ranks import Ranks
from shardc.runtime.wire.groups import default_device_mesh

AUTO = "auto"  # the plan is searched for


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
    without: str | Sequence[str] = (),
    hardware: Hardware | str | None = None,
) -> CompiledModule:
    """Shard a model over a mesh by a plan. The model is taken over in place: its parameters become the shards.

    model: an nn.Module. plan: a `Plan`, a dict of patterns -> styles for the only mesh dim, a style for the
    root, None for the module's own annotations, or on a `shardc.Mesh` "auto": what `search` finds for the first call.
    mesh: a torch DeviceMesh (real ranks), or a `shardc.Mesh` (all simulated here; global tensors in and out). inputs,
    outputs: layouts of the root's inputs and outputs; what is rows of the batch the graph shows by itself
    (docs/inputs_and_results.md). init: what fills a model on meta: None calls `reset_parameters` of every module that
    owns tensors there, a function is called per such module, a state_dict or a path (safetensors, or a folder of
    torch.distributed.checkpoint) is loaded; of a pair (one of these, function or None) the second fills what the
    first lacks. src_data_rank: whose values win; None: each rank slices its own. precision: the dtypes that are
    computed with, reduced in and returned.
    recompute: patterns of modules whose activations are computed again in backward. rng: "counter", random numbers
    that are the same on any mesh, one device included, or "replay", those that plain eager torch draws on one device.
    dynamic: sizes of inputs stay symbolic, and one program serves all that take the same path (docs/dynamic.md).
    backend: "eager" runs the graph's own Python, "inductor" compiles what a rank computes between collectives, a
    function does so as for `torch.compile`. strict: errors instead of reports. without: names of optimizing passes to
    leave out, such as "overlap", to see what they do or whether they are at fault (passes/pipeline.py lists them).
    hardware: the machine, or a preset's name, that layouts which nobody fixed are chosen for (docs/deciding.md).

    Raises PlanError for a plan, mesh or option that makes no sense, before any collective; ShardingError, at
    the first call or `lower`, for a module that cannot be traced or sharded so.
    """
    try:
        _check_model(model)
        _check_options(precision, rng, backend, dynamic)
        check_init(init)
        machine = Hardware.of(hardware)
        integers, device_mesh = _mesh(mesh, plan, model)
        _check_source(src_data_rank, integers)
        patterns, left_out = _patterns(recompute, model, strict), _left_out(without)
        options = Options(strict, patterns, rng, precision, dynamic, backend, left_out, machine)
        layouts = {"inputs": inputs, "outputs": outputs}
        resolved, planned = _resolved(plan, model, integers, device_mesh, layouts, options)
        if device_mesh is not None:
            check_placements(resolved)
        resolved = with_precision(resolved, precision)
        ranks = Ranks(device_mesh) if device_mesh is not None else None
        Filling(model, resolved, ranks, src_data_rank).fill(init)
    except PlanError as error:
        raise error.at(call_site()) from None
    lower = partial(Lowering, mesh=integers, ranks=ranks, options=options, planned=planned)
    return bind(model, BoundModel(model, resolved, lower))


def _resolved(
    plan: Any, model: nn.Module, mesh: Mesh, real: DeviceMesh | None, layouts: Mapping[str, Any], options: Options
) -> tuple[Resolved, Planned | None]:
    """The plan met with the model; of "auto" what will find one at the first call, and until then none."""
    options.hardware.check(mesh)
    if not (isinstance(plan, str) and plan == AUTO):
        return resolve(plan, model, mesh, **layouts, strict=options.strict), None
    if real is not None:
        raise PlanError(
            'the plan is "auto" on real ranks, and which ranks pass which rows is for the plan to say',
            help="plan = shardc.search(model, mesh, inputs).plan on every rank, then compile(model, plan, mesh=mesh)",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is planned yet
        return resolve(None, model, mesh, **layouts), partial(planned, mesh=mesh, options=options, **layouts)


def _check_model(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise PlanError(f"compile was given the class {model.__name__}", help=f"build it first: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise PlanError(f"compile takes an nn.Module, not {shown(model)}", help="write compile(model, plan, mesh=mesh)")
    for fqn, module in model.named_modules():
        if is_compiled(module):
            raise PlanError(
                f"{fqn or 'this module'} is compiled already",
                help="compile the outermost module once, with one plan, and call what compile returned",
            )


def _check_source(rank: Any, mesh: Mesh) -> None:
    if rank is not None and (not isinstance(rank, int) or not 0 <= rank < mesh.size):
        raise bad_option("src_data_rank", rank, f"a rank of the mesh, below {mesh.size}, or None")


def _patterns(recompute: Any, model: nn.Module, strict: bool) -> tuple[str, ...]:
    """Patterns of the modules to recompute. One that matches nothing is warned of, or with `strict` an error."""
    found = (recompute,) if isinstance(recompute, str) else () if recompute is None else recompute
    if not isinstance(found, (tuple, list)) or not all(isinstance(pattern, str) for pattern in found):
        raise bad_option("recompute", recompute, "a pattern of module names, or several")
    names = [name for name, _ in model.named_modules()]
    for pattern in found:
        if not find(pattern, names):
            what, help = f'recompute "{pattern}" matches nothing', did_you_mean(pattern, names)
            if strict:
                raise PlanError(what, help=help)
            warn_user(f"{what}; {help}")
    return tuple(found)


def _left_out(without: Any) -> tuple[str, ...]:
    """The passes to leave out. Raises PlanError for a name that is no such pass."""
    names = (without,) if isinstance(without, str) else tuple(without)
    for name in names:
        if name not in OPTIONAL:
            raise PlanError(f"{shown(name)} is no pass that can be left out", help=f"one of: {', '.join(OPTIONAL)}")
    return names


def _check_options(precision: Any, rng: Any, backend: Any, dynamic: bool) -> None:
    if precision is not None and not isinstance(precision, Precision):
        raise bad_option("precision", precision, "a shardc.Precision, such as Precision(param=torch.bfloat16)")
    if rng not in ("counter", "replay"):
        raise bad_option("rng", rng, '"counter" or "replay"')
    if not isinstance(dynamic, bool):
        raise bad_option("dynamic", dynamic, "True or False")
    if backend not in ("eager", "inductor") and not callable(backend):
        raise bad_option("backend", backend, '"eager", "inductor", or what torch.compile takes as a backend function')


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
            f"mesh is {shown(mesh)}, which is no mesh",
            help="pass a torch DeviceMesh (init_device_mesh) or shardc.Mesh(dp=2, tp=2)",
        )
    return Mesh.of(mesh), mesh


__all__ = ["CompiledModule", "Program", "compile"]
