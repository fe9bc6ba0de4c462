"""Every name that is private in torch, in one file: what it is for. A probe for each is in `torch_probes.py`.

What torch's manual describes under an underscore (fake tensors, dispatch modes, pytrees) is as good as public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
import torch.autograd.forward_ad as forward_ad
import torch.fx.traceback as fx_traceback
import torch.nn.modules.module as modules
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.functional_export import create_fx_graph_from_captured_output
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.functional_utils import has_data_mutation, to_fun
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing
from torch._library.simple_registry import singleton as registry
from torch._logging import trace_structured  # pyright: ignore[reportPrivateImportUsage]
from torch._ops import HigherOrderOperator
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, PendingUnbackedSymbolNotFound, ShapeEnv
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Passed on as they are.
__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "TorchDispatchMode",
    "TracingContext",
    "trace_structured",
]

aten = torch.ops.aten
Flat = Callable[..., tuple[Tensor, ...]]

# `torch.backends.mkldnn.enabled` is refused where a test harness froze it, and `flags` sets TF32, which warns.
mkldnn_enabled, set_mkldnn_enabled = torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled

# ---- forward, read


class Unread(Exception):
    """Dynamo gives no graph, or is not asked."""


# What says that a forward cannot be read, beside what forward itself raises.
REFUSALS = (TorchDynamoException, PendingUnbackedSymbolNotFound, Unread)
# What Dynamo writes into a graph where forward turns gradients or autocast on or off. They have no other name.
AMBIENT = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


def read_bytecode(root: nn.Module, args: Any, kwargs: Any, **options: Any) -> tuple[GraphModule, Any]:
    """Forward as one graph of calls, and what Dynamo tells of it. torch.export reads alike, but keeps no guards, and
    refuses a module whose attributes change."""
    with dynamo_config.patch(**options), get_metrics_context(), dynamo_timed("fullgraph_capture"):
        captured = fullgraph_capture(root, args, kwargs)
    if captured.backend_input is None:
        raise Unread("forward computes nothing")
    return create_fx_graph_from_captured_output(captured, root, args, kwargs), captured


def ignored_when_reading() -> set[Any]:
    """The functions whose calls Dynamo leaves out."""
    return {*dynamo_config.ignore_logging_functions}


def guards_of(captured: Any) -> set[tuple[str, str | None]]:
    """(expression, attribute asked for or None) of all that forward was read to depend on."""
    guards = captured.graph_capture_output.output_graph.guards
    return {(g.name, getattr(g.create_fn, "keywords", {}).get("attr")) for g in guards if g.name}


@contextmanager
def capturing(data: bool) -> Iterator[None]:
    """data: calls whose sizes or numbers data decides go into the graph, instead of being refused."""
    with dynamo_config.patch(capture_scalar_outputs=data, capture_dynamic_output_shape_ops=data):
        yield


@contextmanager
def as_if_compiling() -> Iterator[None]:
    """torch.compiler.is_compiling() is true, as it is for code that Dynamo reads."""
    with patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


# What an operator raises for fake tensors where its result depends on what they hold.
UNKNOWN_VALUE, UNKNOWN_SHAPE = DataDependentOutputException, DynamicOutputShapeException


# ---- forward and backward, joined

# What an input of the joint graph is, the idx-th or the gradient of an `output`; and what an output is.
Primal, Tangent, Result, Gradient = PlainAOTInput, TangentAOTInput, PlainAOTOutput, GradAOTOutput
CHECKED = "aten::_linalg_check_errors"
functional = to_fun  # a tensor under trace, made of a fake one


def is_changed(x: Any) -> bool:
    """Whether a tensor under trace has been written to, or given the memory of another one by `set_`."""
    return has_data_mutation(x) or bool(torch._functionalize_was_storage_changed(x.elem))  # pyright: ignore


def joint_graph(flat: Flat, inputs: Sequence[Tensor], context: TracingContext | None) -> GraphModule:
    """The joint graph, descriptors in `meta["desc"]` of its placeholders and output; nothing is decomposed.

    context: what Dynamo gave with the graph that `flat` runs. torch.export adds no backward of more than a loss.
    """
    with ExitStack() as stack:
        # Else torch takes unused random operators out, and eager would draw other numbers from then on.
        stack.enter_context(inductor_config.patch(fallback_random=True))
        if context is not None:
            stack.enter_context(tracing(context))
        # Backward's own checks, of what forward has checked, go.
        check = registry.find(CHECKED).effect
        stack.enter_context(patch.object(check, "_effect", None))
        return aot_export_joint_with_descriptors(stack, _Flat(flat), tuple(inputs), {}, decompositions={}).graph_module


class _Flat(nn.Module):
    """A function in the form that AOTAutograd takes."""

    def __init__(self, flat: Flat) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.flat(*inputs)


def is_higher_order(target: Any) -> bool:
    """Whether an operator is given functions, such as cond."""
    return isinstance(target, HigherOrderOperator)


def is_plain(x: Tensor) -> bool:
    """A tensor of the user's own, whose value of today is not that of every call."""
    return not isinstance(x, (FunctionalTensor, FakeTensor))


def writes(x: Any) -> int:
    """How often a tensor under trace, or another view of the same memory, has been written to."""
    return torch._functionalize_mutation_counter(x.elem)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def functionalizing(mode: FakeTensorMode) -> Iterator[None]:
    """As within a joint trace, below its autograd, on fake tensors: `functional` makes its tensors of theirs."""
    above = torch._C.DispatchKeySet(DispatchKey.Functionalize)
    with torch._C._ExcludeDispatchKeyGuard(above), mode, FunctionalTensorMode():
        yield


# ---- surroundings


# Hooks of every module. torch's trackers, such as that of FlopCounterMode, set some.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)


def is_users_hook(hook: Any) -> bool:
    return not getattr(hook, "__module__", "").startswith("torch.")


@contextmanager
def aside() -> Iterator[None]:
    """Nothing that this is called in is in force: modes that watch or change operators, what keeps tensors for
    backward elsewhere, anomaly detection, notes on the node at hand, trackers of modules. The default device is."""
    device = torch.get_default_device()
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    packing = []
    while pair := torch._C._autograd._top_saved_tensors_default_hooks(True):  # pyright: ignore
        torch._C._autograd._pop_saved_tensors_default_hooks()  # pyright: ignore
        packing.append(pair)
    try:
        with ExitStack() as stack:
            for hooks in GLOBAL_HOOKS:
                stack.enter_context(patch.dict(hooks, {k: v for k, v in hooks.items() if is_users_hook(v)}, clear=True))
            stack.enter_context(_disable_current_modes())
            stack.enter_context(fx_traceback.preserve_node_meta(False))
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
            if device.type != "cpu":
                stack.enter_context(device)
            fx_traceback.current_meta = {}
            yield
    finally:
        for pair in reversed(packing):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)  # pyright: ignore
        for mode in reversed(modes):
            _push_mode(mode)


# ---- operators whose form for tracing computes something else than they do

SHRINKS: tuple[Any, ...] = (aten.hardshrink.default, aten.softshrink.default)
MASKED_SELECT = aten.masked_select.default
_select_of_one_shape = fake_impls.op_implementations_dict[MASKED_SELECT]


@contextmanager
def as_they_run() -> Iterator[None]:
    """Within, what is traced is what runs."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(fake_impls.op_implementations_dict, {MASKED_SELECT: _masked_select}))
        for op in SHRINKS:  # in torch 2.13 their forms for tracing give a NaN another gradient
            stack.callback(op._dispatch_cache.clear)
            stack.enter_context(patch.dict(op.py_kernels))
            op.py_kernels.pop(DispatchKey.Autograd, None)
            op._dispatch_cache.clear()
        yield


def _masked_select(mode: Any, op: Any, x: Tensor, mask: Tensor) -> Tensor:
    """torch 2.13 takes the elements of `x` for a bound, where the mask may have more."""
    return _select_of_one_shape(mode, op, x.expand(torch.broadcast_shapes(x.shape, mask.shape)), mask)


# ---- sizes and numbers that are not known


def size_symbol(env: ShapeEnv, n: int, name: str) -> Any:
    """A symbol for a size of an argument, n in this call. torch's own, for dims marked dynamic, forgets the name."""
    source = ConstantSource(name)
    symbol = env.create_symbol(n, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return env.create_symintnode(symbol, hint=n, source=source)


@contextmanager
def questions() -> Iterator[list[Exception]]:
    """The errors for branches on symbols, within: also those that somebody caught."""
    asked: list[Exception] = []
    make = ShapeEnv._make_data_dependent_error

    def made(*args: Any, **kwargs: Any) -> Exception:
        asked.append(make(*args, **kwargs))
        return asked[-1]

    with patch.object(ShapeEnv, "_make_data_dependent_error", made):
        yield asked


begin_dual_level = torch._C._enter_dual_level  # as a graph does; torch.autograd.forward_ad keeps count beside it


@contextmanager
def transforms_ended() -> Iterator[None]:
    """An error inside of a torch.func transform that a graph begins and ends by itself leaves it begun, for ever."""
    stack = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    depth, outside = stack.get_dynamic_layer_stack_depth(), forward_ad._current_level < 0
    try:
        yield
    except BaseException:
        stack.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        if outside:
            with suppress(RuntimeError):  # one is begun, and torch allows no two
                begin_dual_level()
            torch._C._exit_dual_level(level=0)
        raise
