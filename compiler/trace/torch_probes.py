"""Whether this torch still does what `torch_internals.py` counts on.

broken()    what it does otherwise, a line each, with the private names that this is about
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from shardc.compiler.trace.torch_internals import (
    AMBIENT,
    CHECKED,
    GLOBAL_HOOKS,
    REFUSALS,
    SHRINKS,
    UNKNOWN_SHAPE,
    UNKNOWN_VALUE,
    DispatchKey,
    FakeTensorMode,
    FunctionalTensor,
    Gradient,
    Primal,
    Result,
    Tangent,
    TracingContext,
    as_if_compiling,
    as_they_run,
    aside,
    aten,
    begin_dual_level,
    capturing,
    functional,
    functionalizing,
    guards_of,
    ignored_when_reading,
    is_changed,
    is_higher_order,
    is_plain,
    joint_graph,
    mkldnn_enabled,
    questions,
    read_bytecode,
    registry,
    set_mkldnn_enabled,
    size_symbol,
    trace_structured,  # pyright: ignore
    transforms_ended,
    writes,
)  # fmt: skip


class _Sample(nn.Module):
    """A little of what forward may do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(2, 2)), 2

    def forward(self, x: Tensor, branch: bool, calls: bool) -> Any:
        if branch and x.sum() > 0 or not calls:
            return 0
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.rand(2)
        return x @ self.weight * self.scale


def _reading() -> bool:
    ignored = ignored_when_reading()
    gm, captured = read_bytecode(_Sample(), (torch.ones(2, 2), False, True), {}, ignore_logging_functions=ignored)
    known = ("L['self'].scale", None) in guards_of(captured) and isinstance(gm.meta["tracing_context"], TracingContext)
    return known and {*AMBIENT} <= {node.target for node in gm.graph.nodes}


def _refusing() -> bool:
    for branch, calls in ((True, True), (False, False)):
        try:
            read_bytecode(_Sample(), (torch.ones(2, 2), branch, calls), {})
        except REFUSALS:
            continue
        return False
    with capturing(True):
        gm, _ = read_bytecode(nn.Flatten(0), (torch.ones(2, 2),), {})
    return len(gm.graph.nodes) == 3


def _joining() -> bool:
    """What is what is told, a draw that nobody uses stays, backward is marked."""

    def flat(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        torch.rand(2)
        return (torch.linalg.inv(x) @ w,)

    with FakeTensorMode() as mode:
        inputs = [torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)]
    nodes = [*joint_graph(flat, inputs, TracingContext(mode)).graph.nodes]
    described = [n.meta["desc"] for n in nodes if n.op == "placeholder"] + list(nodes[-1].meta["desc"])
    told = [type(x) for x in described] == [Primal, Primal, Tangent, Result, type(None), Gradient]
    calls = {n.target: n.meta.get("partitioner_tag") for n in nodes if n.op == "call_function"}
    kinds = is_higher_order(torch.ops.higher_order.cond) and not any(map(is_higher_order, calls))
    return told and kinds and aten.rand.default in calls and calls[aten.mm.default] == "is_backward"


def _checking() -> bool:
    return registry.find(CHECKED).effect._effect is not None


def _functional() -> bool:
    with FakeTensorMode() as mode:
        fake = torch.ones(2)
    with functionalizing(mode):
        x = functional(fake)
        before = writes(x), is_changed(x), is_plain(x), is_plain(fake), isinstance(x, FunctionalTensor)
        x.add_(1)
        y, z = functional(fake), functional(fake)
        y.set_(z)
        changed = is_changed(x) and is_changed(y) and not is_changed(z)
        return before == (0, False, False, False, True) and writes(x) == 1 and changed


def _surroundings() -> bool:
    with torch.device("meta"), aside():
        kept = torch.empty(1).is_meta
    with FakeTensorMode(), FlopCounterMode(display=False), torch.autograd.graph.saved_tensors_hooks(abs, abs), aside():
        real = is_plain(torch.empty(1)) and not any(GLOBAL_HOOKS)
        real = real and torch.ones(1, requires_grad=True).exp().grad_fn._saved_result is not None  # pyright: ignore
    with as_if_compiling():
        asked = torch.compiler.is_compiling()
    return kept and real and asked and not torch.compiler.is_compiling()


def _logging() -> bool:
    trace_structured("artifact", metadata_fn=dict, payload_fn=str, expect_trace_id=False)
    return True


def _as_they_run() -> bool:
    """Both mendings are still needed, and do their work."""
    x, mask = torch.ones(3, 1), torch.ones(3, 4, dtype=torch.bool)
    bounds = []
    for mended in (nullcontext(), as_they_run()):
        with mended, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
            (n,) = x.masked_select(mask).shape
            upper: Any = n.node.shape_env.bound_sympy(n.node.expr).upper  # pyright: ignore[reportAttributeAccessIssue]
            bounds.append((upper, DispatchKey.Autograd in SHRINKS[0].py_kernels))
    return bounds == [(3, True), (12, False)]


def _unknown() -> bool:
    env = ShapeEnv()
    with questions() as asked, FakeTensorMode(allow_non_fake_inputs=True):
        for ask, error in (
            (lambda: bool(env.create_unbacked_symint() == 3), RuntimeError),
            (lambda: torch.ones(1).item(), UNKNOWN_VALUE),
            (lambda: torch.ones(1).nonzero(), UNKNOWN_SHAPE),
        ):
            try:
                ask()
            except error:
                continue
            return False
    return len(asked) == 1 and size_symbol(env, 4, "x_0").node.expr.is_Symbol


def _flags() -> bool:
    before = mkldnn_enabled()
    set_mkldnn_enabled(not before)
    changed = mkldnn_enabled()
    set_mkldnn_enabled(before)
    return changed is not before and mkldnn_enabled() is before


def _transforms() -> bool:
    try:
        with transforms_ended():
            begin_dual_level()
            torch.func.grad(_fails)(torch.ones(()))
    except KeyError:
        with forward_ad.dual_level():  # which raises where one is left
            return torch.ones(1).requires_grad_().requires_grad
    return False


def _fails(x: Tensor) -> Tensor:
    raise KeyError


# What each private name that is used here is held against. test_torch_internals.py sees to it that none is missing.
PROBES: dict[Callable[[], bool], str] = {
    _reading: """_dynamo.config _dynamo.config.patch _dynamo.config.ignore_logging_functions
        _dynamo.convert_frame.fullgraph_capture _dynamo.utils.dynamo_timed _dynamo.utils.get_metrics_context
        _dynamo.functional_export.create_fx_graph_from_captured_output _guards.TracingContext
        _C._set_grad_enabled amp.autocast_mode._enter_autocast amp.autocast_mode._exit_autocast""",
    _flags: "_C._get_mkldnn_enabled _C._set_mkldnn_enabled",
    _refusing: "_dynamo.exc.TorchDynamoException",
    _joining: """_functorch.aot_autograd.aot_export_joint_with_descriptors _guards.tracing _ops.HigherOrderOperator
        _functorch._aot_autograd.descriptors.PlainAOTInput _functorch._aot_autograd.descriptors.PlainAOTOutput
        _functorch._aot_autograd.descriptors.GradAOTOutput _functorch._aot_autograd.descriptors.TangentAOTInput
        _inductor.config _inductor.config.patch""",
    _checking: "_library.simple_registry.singleton _library.simple_registry.singleton.find",
    _functional: """_functionalize_mutation_counter _functionalize_was_storage_changed
        _functorch._aot_autograd.functional_utils.has_data_mutation
        _functorch._aot_autograd.functional_utils.to_fun _subclasses.functional_tensor.FunctionalTensor
        _subclasses.functional_tensor.FunctionalTensorMode _C._ExcludeDispatchKeyGuard _C.DispatchKeySet
        _C.DispatchKey _C.DispatchKey.Functionalize""",
    _surroundings: """_C._len_torch_function_stack overrides._pop_mode overrides._push_mode
        utils._python_dispatch._disable_current_modes _subclasses.fake_tensor.FakeTensor
        _C._autograd._top_saved_tensors_default_hooks _C._autograd._pop_saved_tensors_default_hooks
        _C._autograd._push_saved_tensors_default_hooks nn.modules.module._global_forward_pre_hooks
        nn.modules.module._global_forward_hooks nn.modules.module._global_backward_pre_hooks
        nn.modules.module._global_backward_hooks""",
    _logging: "_logging.trace_structured",
    _as_they_run: "_subclasses.fake_impls _subclasses.fake_impls.op_implementations_dict _C.DispatchKey.Autograd",
    _transforms: """_C._functorch autograd.forward_ad._current_level
        _C._enter_dual_level _C._exit_dual_level""",
    _unknown: """_dynamo.source.ConstantSource fx.experimental.symbolic_shapes.ShapeEnv._make_data_dependent_error
        _subclasses.fake_tensor.DataDependentOutputException _subclasses.fake_tensor.DynamicOutputShapeException""",
}


def broken() -> list[str]:
    """The probes that this torch fails, each with the names that it is about and what went wrong."""
    out = []
    for probe, names in PROBES.items():
        try:
            held, why = probe(), "it does something else"
        except Exception as error:
            held, why = False, f"{type(error).__name__}: {error}"
        if not held:
            out.append(f"{why}: {' '.join(names.split())}")
    return out
