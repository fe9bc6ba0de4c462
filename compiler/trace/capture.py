"""From a module and example arguments to torch's own joint forward and backward graph.

Two ways in. Dynamo reads forward's bytecode: it sees Python side effects and gives each node its source
line. What it cannot read (TorchScript, calls it was told to leave alone) is run once on fake tensors and
recorded operator by operator. Both end in AOTAutograd, which adds the backward.

AOTAutograd sees a function without mutation and without aliasing: each input is copied before forward
touches it, each output after, and a changed input is one more output. trace_graph.py takes the copies out.
Outputs are copied contiguous, so that tangents are contiguous whatever the strides of what they belong to.
"""

from __future__ import annotations

import builtins
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.marks import MARK, Marked
from shardc.compiler.rules.checks import CHECK
from shardc.compiler.rules.facts import written
from shardc.compiler.trace.module.attributes import Attributes, Effect
from shardc.compiler.trace.module.reads import Look, mutables, of_guards
from shardc.compiler.trace.module.results import opened
from shardc.compiler.trace.module.rewrites import Rewrites
from shardc.compiler.trace.module.stand_ins import Held
from shardc.compiler.trace.sizes.data_decided import KINDS, SYMBOLIC, as_tensor
from shardc.compiler.trace.sources import COMMUNICATION, communicates, refused_at, without_data, writes_to_constant
from shardc.compiler.trace.torch_internals import (
    UNKNOWN_SHAPE,
    UNKNOWN_VALUE,
    FakeTensor,
    FunctionalTensor,
    TorchDispatchMode,
    TracingContext,
    Unread,
    as_if_compiling,
    ignored_when_reading,
    is_changed,
    is_plain,
    questions,
    read_bytecode,
    transforms_ended,
)
from shardc.compiler.user_code import is_users

LOG_METHODS = ("debug", "info", "warn", "error", "exception", "critical", "log")

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Program:
    """Forward as a function of tensors: parameters and buffers first, then the tensors of the arguments."""

    held: Sequence[Held]
    rebuild: Callable[[Sequence[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
    attributes: Attributes
    name: Callable[[Sequence[Any]], str]  # of what can be reached by these keys from the arguments
    grad: bool
    call: Call | None = None
    notes: tuple[str, ...] = ()
    look: Look | None = None  # at what Dynamo read, where it was Dynamo
    out_spec: Any = None
    # Of the result, then of what forward sets beside tensors:
    leaves: list[Any] = field(default_factory=list)  # constants, None where a tensor stands
    names: list[str] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)  # which leaves are tensors, or numbers that data decides
    same: dict[int, int] = field(default_factory=dict)  # a leaf -> an earlier one that is the same tensor
    numbers: dict[int, str] = field(default_factory=dict)  # ... and of what type those are
    mutated: list[int] = field(default_factory=list)  # which inputs forward changes
    effects: list[Effect] = field(default_factory=list)  # what it sets beside tensors
    changed: list[str] = field(default_factory=list)  # what that is called
    overwritten: list[tuple[str, Any]] = field(default_factory=list)  # what it puts others in the place of, by name
    foreign: list[Any] = field(default_factory=list)  # the containers it changes that are neither its own nor passed
    registered: list[str] = field(default_factory=list)  # parameters, buffers and modules that it registers
    replaced: list[int] = field(default_factory=list)  # inputs it replaces, or gives another shape
    shared: list[tuple[int, int]] = field(default_factory=list)  # inputs that it makes share memory
    attached: list[int] = field(default_factory=list)  # arguments it writes values to that require grad
    objects: list[Any] = field(default_factory=list)  # of the result, each taken apart by its attributes
    lasting: list[Any] = field(default_factory=list)  # those of them that another run gave as well

    def run(self, *flat: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.clone() for tensor in flat]
        shapes = [(tensor.shape, tensor.stride()) for tensor in inputs]
        try:
            for h, tensor in zip(self.held, inputs[: len(self.held)], strict=True):
                h.put(tensor)
            args, kwargs = self.rebuild(inputs[len(self.held) :])
            self.attributes.watch_call((args, kwargs), self.name)
            assert self.call is not None
            with recording():
                result, objects = opened(self.call(args, kwargs))
            self.lasting += [o for o in objects if any(o is other for other in self.objects)]
            self.objects = objects
            after = self._after(inputs)
            # Not by version counters: batch norm changes its statistics without counting.
            self.mutated = [i for i, t in enumerate(inputs) if after[i] is not t or is_changed(t)]
            self.shared += _sharing(inputs)
            self.replaced += [i for i, t in enumerate(inputs) if shapes[i] != (t.shape, t.stride())]
            # Of a tensor that `set_` gave another's memory the label stays, and is wrong.
            self.replaced += [i for i in self.mutated if after[i].detach().shape != after[i].shape]
            self.attached = [i for i in self.mutated if i >= len(self.held) and after[i].requires_grad]
            self.effects, effected, self.changed = self.attributes.effects()
            self.overwritten, self.foreign = self.attributes.overwritten(), self.attributes.foreign()
            self.registered = self.attributes.registered()
        finally:
            self.attributes.restore()
        paths, self.out_spec = pytree.tree_flatten_with_path(result)
        self.names = [f"output{pytree.keystr(path)}" for path, _ in paths] + self.changed
        outputs = [*self._described([leaf for _, leaf in paths] + effected), *(after[i].detach() for i in self.mutated)]
        return tuple((x if self.grad else x.detach()).clone(memory_format=torch.contiguous_format) for x in outputs)

    def _after(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What stands in each input's place now: forward may have assigned a new tensor to a buffer."""
        after = list(inputs)
        self.replaced = []
        for i, h in enumerate(self.held):
            now = next((t for t in (p.get() for p in h.places) if t is not inputs[i]), inputs[i])
            if now is inputs[i]:
                continue
            if now is None or h.parameter or (now.shape, now.dtype) != (inputs[i].shape, inputs[i].dtype):
                self.replaced.append(i)
            else:
                after[i] = now
        return after

    def _described(self, leaves: list[Any]) -> list[Tensor]:
        every = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, (Tensor, *SYMBOLIC))}
        first = {id(leaf): i for i, leaf in reversed(every.items())}
        self.leaves = [None if i in every else leaf for i, leaf in enumerate(leaves)]
        self.same = {i: first[id(leaf)] for i, leaf in every.items() if first[id(leaf)] != i}
        self.tensors = [i for i in every if i not in self.same]
        self.numbers = {i: KINDS[type(leaf)] for i, leaf in every.items() if isinstance(leaf, SYMBOLIC)}
        return [as_tensor(every[i]) if i in self.numbers else every[i] for i in self.tensors]  # pyright: ignore


def _sharing(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Pairs of tensors, each with an earlier one in whose memory it lies."""
    first: dict[int, int] = {}
    memory = [getattr(x, "elem", x).untyped_storage()._cdata for x in tensors]  # the tensor under trace has none
    pairs = [(i, first.setdefault(memory[i], i)) for i, x in enumerate(tensors) if x.numel()]
    return [(i, earlier) for i, earlier in pairs if i != earlier]


class _Root(nn.Module):
    """A parent for the module, so that none of its names can clash with those of a captured graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.root = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.root(*args, **kwargs)


def _root(module: nn.Module) -> _Root:
    """A root whose forward has globals of its own: Dynamo puts there, for good, what its bytecode needs."""
    forward = FunctionType(_Root.forward.__code__, {"__builtins__": builtins, "__name__": __name__})
    return type("_Root", (_Root,), {"forward": forward})(module)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch says of its own tracing, unless the user turned its logs on."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._subclasses", "torch._logging")]
    loggers = [logger for logger in loggers if not logger.isEnabledFor(logging.INFO)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace")  # it refuses next
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # it looks at what lists hold
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def recording() -> Iterator[None]:
    """How forward is run while it is recorded: with its sources, in forms that a program can hold."""
    with fx_traceback.preserve_node_meta(), Rewrites(), _Checks():
        yield


def by_dynamo(module: nn.Module, program: Program, tensors: Sequence[Tensor]) -> tuple[GraphModule, TracingContext]:
    """The captured forward, and the context AOTAutograd must run it in. Raises one of REFUSALS."""
    if any(isinstance(owner, torch.jit.ScriptModule) for owner in module.modules()):
        raise Unread("it holds a scripted module")
    args, kwargs = program.rebuild(tensors)
    root = _root(module)
    # Those that libraries add to Logger too, such as warning_once.
    logs = {method for name, method in vars(logging.Logger).items() if name.startswith(LOG_METHODS)}
    options = {
        "allow_rnn": True,
        "assume_static_by_default": True,
        "automatic_dynamic_shapes": False,
        "specialize_int": True,
        "specialize_float": True,
        "ignore_logging_functions": {*ignored_when_reading(), print, warnings.warn, *logs},
        "side_effect_replay_policy": "silent",
        "skip_nnmodule_hook_guards": False,
    }
    gm, captured = read_bytecode(root, args, kwargs, **options)
    program.look = of_guards(captured, root, (args, kwargs))
    for one in mutables(program.look) if program.look is not None else ():
        program.attributes.watch(*one)
    return gm, gm.meta["tracing_context"]


def replay(gm: GraphModule) -> Call:
    """A captured forward, to be recorded operator by operator."""
    return lambda args, kwargs: Replay(gm).run(*args, *kwargs.values())


def by_dispatch(module: nn.Module, blind: bool = False) -> Call:
    """Forward itself, to be recorded operator by operator; blind: no value of a tensor may be asked for."""
    fqns = {id(owner): (fqn, type(owner)) for fqn, owner in module.named_modules()}

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with (
            as_if_compiling(),
            torch.jit.optimized_execution(False),  # pyright: ignore
            _Stamp(fqns, blind, call.__code__) as stamp,
            _Alias(),
            questions() as asked,
        ):
            result = module(*args, **kwargs)
        for error in filter(None, (stamp.asked, *asked)):  # and forward went on without an answer
            raise error
        return result

    return call


class _Checks(TorchDispatchMode):
    """Records the error checks of torch.linalg as operators with a result, which need no order among them."""

    supports_higher_order_operators = True  # they are refused by name, later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._linalg_check_errors.default:
            return func(*args, **(kwargs or {}))
        CHECK(*args, **(kwargs or {}))
        return None


@dataclass
class _Marked:
    """Which marked values are one tensor to the user, so that changing one in place changes the others.

    A mark is a copy. Where eager would write to the marked tensor itself, the write is carried over.
    """

    groups: list[list[list[Any]]] = field(default_factory=list)  # of [tensor, version]

    def join(self, x: Tensor, marked: Tensor) -> None:
        for group in self.groups:
            if any(tensor is x for tensor, _ in group):
                group.append([marked, marked._version])
                return
        self.groups.append([[x, x._version], [marked, marked._version]])

    def sync(self) -> None:
        stale = True
        while stale:
            stale = False
            for group in self.groups:
                source = next((entry for entry in reversed(group) if entry[0]._version != entry[1]), None)
                if source is None:
                    continue
                stale = True
                for entry in group:
                    if entry is not source:
                        entry[0].copy_(source[0])
                    entry[1] = entry[0]._version


class Replay(Interpreter):
    """Runs the captured graph, each operator recorded with the source of its node."""

    def __init__(self, gm: GraphModule, graph: Graph | None = None) -> None:
        super().__init__(gm, graph=graph)
        self._marked = _Marked()
        self._constants: list[tuple[Tensor, int]] = []

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input; one that is a tensor of the user's own, a constant, is copied, never to be written to."""
        value = super().placeholder(target, args, kwargs)
        if not isinstance(value, Tensor) or isinstance(value, FunctionalTensor):
            return value
        if isinstance(value, FakeTensor):  # a plain attribute on meta: see trace_modules.standing_in
            raise without_data(next((n.meta.get("stack_trace") for n in self._node.users), None))
        copy = value.clone()
        self._constants.append((copy, copy._version))
        return copy

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with transforms_ended():
            return super().run(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return Marked.apply(*args) if target is MARK else super().call_function(target, args, kwargs)
        except ShardingError as error:
            raise refused_at(self._node.meta.get("stack_trace"), error) from None

    def run_node(self, n: Node) -> Any:
        self._node, held = n, (self.env.get(m) for m in n.all_input_nodes)
        operands = [value for value in held if isinstance(value, Tensor)]
        versions = [t._version for t in operands]
        result = super().run_node(n)
        if n.target is MARK:
            self._marked.join(operands[0], result)
        elif any(t._version != v for t, v in zip(operands, versions, strict=True)):
            self._marked.sync()
            if any(constant._version != version for constant, version in self._constants):
                raise writes_to_constant(n.meta.get("stack_trace"))
        return result


class _Alias(TorchFunctionMode):
    """The same for a forward that runs itself."""

    def __init__(self) -> None:
        super().__init__()
        self._marked = _Marked()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._marked.sync()  # before each call, as TorchScript writes unseen
        result = Marked.apply(*args) if func is MARK else func(*args, **(kwargs or {}))
        if func is MARK:
            self._marked.join(args[0], result)
        return result

    def __exit__(self, *error: Any) -> None:
        self._marked.sync()
        super().__exit__(*error)


class _Stamp(TorchDispatchMode):
    """Gives each recorded operator the source line and the module it is called from."""

    def __init__(self, fqns: dict[int, tuple[str, type]], blind: bool, asking: CodeType) -> None:
        super().__init__()
        self._fqns, self._blind, self._asking = fqns, blind, asking
        self.asked: Exception | None = None  # what came of looking at a value

    def __enter__(self) -> _Stamp:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line, owner = self._caller()
        if func.namespace in COMMUNICATION:
            raise communicates(line, str(func).removesuffix(".default"))
        changed = [x for _, x in written(func, args, kwargs or {}) if isinstance(x, Tensor)]
        if not all(isinstance(x, FunctionalTensor) for x in changed):
            raise writes_to_constant(line)
        meta = fx_traceback.current_meta
        meta["stack_trace"] = line
        meta["nn_module_stack"] = {str(owner): self._fqns[owner]} if owner else {}
        try:
            if self._blind and func is torch.ops.aten._local_scalar_dense.default and is_plain(args[0]):
                raise UNKNOWN_VALUE(func)
            return func(*args, **(kwargs or {}))
        except (UNKNOWN_VALUE, UNKNOWN_SHAPE) as error:
            self.asked = error
            raise

    def _caller(self) -> tuple[str, int | None]:
        frame, line, owner = inspect.currentframe(), "", None
        while frame is not None and not (line and owner):
            code = frame.f_code
            if not line and is_users(code.co_filename):
                line = f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n'
            if code is self._asking:
                break  # further out is who asked for the trace
            receiver = frame.f_locals.get("self")
            if not owner and id(receiver) in self._fqns and isinstance(receiver, nn.Module):
                owner = id(receiver)
            frame = frame.f_back
        return line, owner
