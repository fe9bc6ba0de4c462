"""Turns any nn.Module into one joint forward and backward ATen graph of global shapes, without computing.

    traced = trace(module, (x,), {}, marks=["layers.0"])
    traced.gm            one FX graph: placeholders, aten calls, one flat output tuple
    traced.signature     what each of them is

No real tensor is read or written, none as large as the model is made, no process group is needed, and
the module is afterwards as it was. Every call node's meta says where it comes from (`trace_sources.py`).
"""

from __future__ import annotations

import inspect
import itertools
import logging
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.signature import InputKind, Leaf, OutputKind, Signature, TensorInfo, Traced
from shardc.compiler.trace.capture import Program, by_dispatch, by_dynamo, quiet
from shardc.compiler.trace.joint_graph import Argument, build
from shardc.compiler.trace.layers.copy_layers import export_layers
from shardc.compiler.trace.module.attributes import Attributes
from shardc.compiler.trace.module.border_casts import casting
from shardc.compiler.trace.module.reads import around, functions_of, reads_of
from shardc.compiler.trace.module.stand_ins import (
    Held,
    bordered,
    held_tensors,
    stand_in,
    standing_in,
    trace_device,
)
from shardc.compiler.trace.sizes.data_decided import data_mode
from shardc.compiler.trace.sizes.symbolic import symbolic_mode, symbolic_stand_in
from shardc.compiler.trace.sources import (
    DependsOnValues,
    annotate,
    depends_on_values,
    headline,
    is_fault,
    refusal,
    sparse,
)
from shardc.compiler.trace.torch_internals import (
    REFUSALS,
    FakeTensorMode,
    as_they_run,
    aside,
    capturing,
    joint_graph,
    mkldnn_enabled,
    set_mkldnn_enabled,
)

log = logging.getLogger(__name__)


def trace(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, **options: Any) -> Traced:
    """`trace_once`, and where data decides some size or number, once more so that it may."""
    try:
        return trace_once(module, args, kwargs, **options)
    except DependsOnValues as error:
        if options.get("symbolic"):
            raise
        try:
            return trace_once(module, args, kwargs, **options, data=True)
        except DependsOnValues:
            told = {name: getattr(error, name) for name in ("where", "excerpt", "rule", "help")}
            raise ShardingError(error.what, **told) from error.__cause__


def trace_once(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    marks: Iterable[str] = (),
    params: Mapping[str, TensorInfo] | None = None,
    grad: bool = True,
    symbolic: bool = False,
    data: bool = False,
    casts: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Traced:
    """The joint graph of `module(*args, **kwargs)`, in the train or eval mode it is in.

    Of the arguments' tensors only shape, strides, dtype, device and requires_grad count: fake and meta
    ones will do. `params` says the same of parameters and buffers whose tensors in the module do not
    (shards, meta tensors), by FQN. `marks` are the FQNs of modules whose border is kept (`marks.py`).
    Without `grad`, or where nothing needs a gradient, there is a forward only. `symbolic`: the arguments' sizes
    are symbols (`symbolic.Template`). data: what tensors hold may decide sizes and numbers (`data_decided.py`).
    casts: modules whose floating-point inputs arrive in a dtype of theirs.
    """
    held = held_tensors(module, params)
    _refuse_mixed_scripts(module)
    call = _Arguments.of(module, tuple(args), dict(kwargs or {}))
    infos = [h.info for h in held] + [info for info in call.infos if info is not None]
    device = trace_device(infos)
    mode = symbolic_mode() if symbolic else data_mode() if data else FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for context in (aside(), torch.inference_mode(False), torch.set_grad_enabled(grad)):
            stack.enter_context(context)
        stack.enter_context(_plain_operators())
        stack.enter_context(capturing(data))
        stack.enter_context(as_they_run())
        stack.callback(Attributes(module).restore)
        fakes = [stand_in(h.info, mode, device, h.tensor) for h in held]
        named = [(name, info) for name, info in zip(call.names, call.infos, strict=True) if info is not None]
        tensors = [
            symbolic_stand_in(info, mode, device, name) if symbolic else stand_in(info, mode, device, torch.empty(0))
            for name, info in named
        ]
        stack.enter_context(standing_in(module, held, fakes, mode, device))
        stack.enter_context(casting(module, casts))
        stack.enter_context(bordered(module, tuple(marks)))
        program = Program(held, call.rebuild, Attributes(module), call.name, grad)
        stack.callback(program.attributes.restore)
        for name, value in (found for function in functions_of(module) for found in around(function)):
            program.attributes.watch(name, value)
        joint = _joint(module, program, fakes, tensors, data)
        _refuse_unrepeatable(program)
        arguments = [*_held_arguments(held), *call.arguments()]
        constants = _tensor_attributes(module)
        gm, signature = build(
            joint, program, arguments, call.leaves(len(held)), constants, call.about(held), not symbolic
        )
    _refuse_or_report(program, held, signature, call)
    annotate(gm.graph, signature, module)
    gm.graph.lint()
    reads = reads_of(module, program.look, program.changed, program.foreign)
    return Traced(gm, replace(signature, effects=tuple(program.effects), reads=reads, notes=program.notes))


def _joint(
    module: nn.Module, program: Program, fakes: Sequence[Tensor], tensors: Sequence[Tensor], data: bool
) -> GraphModule:
    """torch's joint graph: of what Dynamo reads, and where it refuses to, of forward as it runs on fake tensors."""
    flat = [*fakes, *tensors]
    with quiet():
        try:
            captured = by_dynamo(module, program, tensors)
        except REFUSALS as error:
            program.look, refused = None, error
        else:
            return _run(lambda: export_layers(program, flat, *captured))
        told = refusal(refused) if depends_on_values(refused) else None  # or only a function does: see rewrites.py
        program.notes = (f"traced by dispatch, where forward runs once: {headline(refused)}",)
        program.call = by_dispatch(module, blind=data or told is not None)
        try:
            with _drawing_nothing():
                return _run(lambda: joint_graph(program.run, flat, None))
        except ShardingError as error:
            raise (told if told and told.where else error) from (refused if told else error.__cause__)


def _run(step: Callable[[], GraphModule]) -> GraphModule:
    """What forward does wrong is told to its author. What this room does wrong stays as it is."""
    try:
        return step()
    except ShardingError:
        raise
    except Exception as error:
        if is_fault(error):
            raise
        raise refusal(error) from error


@contextmanager
def _drawing_nothing() -> Iterator[None]:
    """Refuses what draws from a generator that tracing does not see: its numbers would be the same forever."""
    numpy = sys.modules.get("numpy")
    python, other = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
        if random.getstate() != python or (numpy and str(numpy.random.get_state()) != str(other)):
            raise ShardingError(
                "forward draws random numbers with Python or numpy, which a program cannot repeat",
                help="draw them with torch, or outside forward",
            )
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(other)


@dataclass(frozen=True)
class _Arguments:
    """The example arguments, flattened: a name per leaf, and the tensors' metadata."""

    names: tuple[str, ...]
    values: tuple[Any, ...]
    infos: tuple[TensorInfo | None, ...]
    spec: Any
    positional: int
    keywords: tuple[str, ...]
    name: Callable[[Sequence[Any]], str]  # of what can be reached by these keys from (args, kwargs)

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        name = _argument_namer(module)
        names = tuple(name([_key(step) for step in path]) for path, _ in paths)
        values = tuple(value for _, value in paths)
        for leaf, value in zip(names, values, strict=True):
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise sparse(f"{leaf} is", value.layout)
            if type(value).__module__ == "numpy":
                raise ShardingError(f"{leaf} is a numpy {type(value).__name__}", help="pass torch.as_tensor of it")
        infos = tuple(TensorInfo.of(value) if isinstance(value, Tensor) else None for value in values)
        return cls(names, values, infos, spec, len(args), tuple(kwargs), name)

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with these tensors for those of the example."""
        rest = iter(tensors)
        pairs = zip(self.infos, self.values, strict=True)
        return self.spec.unflatten([value if info is None else next(rest) for info, value in pairs])

    def arguments(self) -> list[Argument]:
        pairs = zip(self.names, self.infos, strict=True)
        return [Argument(InputKind.BATCH, name, info.requires_grad) for name, info in pairs if info is not None]

    def leaves(self, start: int) -> list[Leaf]:
        """Each leaf; tensors count their argument from `start`."""
        count = itertools.count(start)
        return [
            Leaf(name, constant=value) if info is None else Leaf(name, input=next(count))
            for name, value, info in zip(self.names, self.values, self.infos, strict=True)
        ]

    def about(self, held: Sequence[Held]) -> dict[str, Any]:
        tied = {alias: h.fqn for h in held for alias in h.aliases}
        return {
            "in_spec": self.spec,
            "positional": self.positional,
            "keywords": self.keywords,
            "tied": MappingProxyType(tied),
        }


def _argument_namer(module: nn.Module) -> Callable[[Sequence[Any]], str]:
    """Names what keys lead to from (args, kwargs) by forward's parameters: `x`, `batch['ids']`, `args[1][0]`."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # scripted modules have none
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    def name(keys: Sequence[Any]) -> str:
        which, key, *further = keys
        if which == 1:
            head = key
        else:
            head = named[key] if key < len(named) else f"{rest}[{key - len(named)}]"
        return head + "".join(f"[{step!r}]" for step in further)

    return name


def _key(step: Any) -> Any:
    """What a step of a pytree's path looks up."""
    return next(getattr(step, name) for name in ("idx", "key", "name") if hasattr(step, name))


def argument_names(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(readable path, path in the keys of border marks) of every leaf of a call's arguments, in pytree order."""
    paths, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    name = _argument_namer(module)
    keys: list[Any] = [path for path, _ in paths]
    heads = [str(path[1].idx) if path[0].idx == 0 else f"kw:{path[1].key}" for path in keys]
    return [(name([_key(step) for step in path]), head) for path, head in zip(keys, heads, strict=True)]


def _held_arguments(held: Sequence[Held]) -> list[Argument]:
    kinds = {True: InputKind.PARAMETER, False: InputKind.BUFFER}
    return [Argument(kinds[h.parameter], h.fqn, h.info.requires_grad) for h in held]


def _tensor_attributes(module: nn.Module) -> dict[int, str]:
    """Names of the tensors that modules hold as plain attributes, by id."""
    return {
        id(value): f"{fqn}.{name}" if fqn else name
        for fqn, owner in module.named_modules()
        for name, value in vars(owner).items()
        if isinstance(value, Tensor)
    }


def _refuse_mixed_scripts(module: nn.Module) -> None:
    for fqn, owner in module.named_modules():
        if isinstance(owner, torch.jit.ScriptModule):
            for child in owner.children():
                if not isinstance(child, torch.jit.ScriptModule):
                    kind = type(child).__name__
                    raise RuntimeError(f"the scripted module {fqn!r} has a Python module ({kind}) in it")


def _refuse_or_report(program: Program, held: Sequence[Held], signature: Signature, call: _Arguments) -> None:
    """What forward does beside computing: refused where the program would be wrong, else reported."""
    names = [*(h.fqn for h in held), *(argument.name for argument in call.arguments())]
    if program.replaced:
        raise ShardingError(
            f"forward puts another tensor in place of {names[program.replaced[0]]}, or changes its shape",
            help="write the new value into it: it must keep its shape",
        )
    if program.shared:
        one, other = (names[i] for i in program.shared[0])
        raise ShardingError(
            f"forward makes {one} lie in the memory of {other}, where each would change with the other from then on",
            help="copy the values: clone() what you assign to .data",
        )
    repeated = Counter(id(value) for value in call.values if isinstance(value, Tensor))
    for output in signature.outputs:
        if output.kind is OutputKind.MUTATION and output.of is not None:
            leaf = next((i for i, name in enumerate(call.names) if name == output.name), None)
            if signature.inputs[output.of].kind is InputKind.BATCH and repeated[id(call.values[leaf or 0])] > 1:
                raise ShardingError(
                    f"forward changes {output.name} in place, and was given the same tensor twice",
                    help="pass a clone as one of them",
                )
    constants = {id(i.value) for i in signature.inputs if i.kind is InputKind.CONSTANT}
    for name, value in program.overwritten:
        if id(value) in constants:
            raise ShardingError(
                f"forward reads the tensor {name} and sets it anew for the next call",
                help=f"register {name} as a buffer",
            )
    for i in program.attached:
        warnings.warn(
            f"forward writes values that require grad into {names[i]}: no gradient flows back through it",
            stacklevel=3,
        )


def _refuse_unrepeatable(program: Program) -> None:
    """What a call of the program could not do again. While forward is traced its own effects are put back."""
    registered, (_, _, late) = program.registered, program.attributes.effects()
    if registered:
        raise ShardingError(
            f"forward registers {', '.join(registered)}", help="register parameters, buffers and modules before compile"
        )
    if late:
        raise ShardingError(
            f"a hook that runs in backward sets {', '.join(dict.fromkeys(late))}, and would do so while tracing alone",
            help="return the values from forward, or set them outside of the module",
        )
    if program.foreign and program.look is None:
        raise ShardingError(
            f"forward or a hook sets {', '.join(dict.fromkeys(program.changed))}, and would do so while tracing alone",
            help="return the values from forward, or set them outside of the module",
        )


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Keeps attention and LSTM from fused inference operators, so that every mode has the same few operators."""
    attention, rnn = torch.backends.mha.get_fastpath_enabled(), mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        set_mkldnn_enabled(rnn)
