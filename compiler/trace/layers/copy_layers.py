"""Layers that repeat are traced once. The joint graph is the one that tracing each of them gives.

While the whole is traced, each place of a layer is one opaque operator in forward and one in backward. What they
stand for is traced as often as it differs: by what the inputs look like, and by which gradients come back and what
those look like. Afterwards each pair gives way to a copy of its layer's joint graph, under the names of the place.

    %layer = shardc.layer([%x, %w], "forward 3 ...")            %mm = aten.mm(%x, %w)
    %layer_1 = shardc.layer([%grad], "backward 3 ...")    ==>   %mm_1 = aten.mm(%grad, %t)

Which operators, gradients' sums and draws there are, and their order, is AOTAutograd's business as before. A layer
that does what a function of its inputs cannot (it writes to one, gives a view of one, leaves autocast on) is traced in
its place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import has_side_effect

from shardc.compiler.ir.marks import MARK
from shardc.compiler.trace.capture import Program, Replay, recording, replay
from shardc.compiler.trace.joint_graph import Joint
from shardc.compiler.trace.layers.repeats import Layer, Place, about, repeats, with_calls
from shardc.compiler.trace.sources import innermost
from shardc.compiler.trace.torch_internals import (
    FakeTensorMode,
    FunctionalTensor,
    TracingContext,
    aside,
    functional,
    functionalizing,
    is_changed,
    joint_graph,
    writes,
)

log = logging.getLogger(__name__)
TAG = "partitioner_tag"
SUMMED = fx_traceback.GRADIENT_ACC_SPECIAL_STACK


# What a place of a layer makes of its inputs, in forward or backward. Only ever traced, so nothing says how to run it.
torch.library.define("shardc::layer", "(Tensor[] inputs, str what) -> Tensor[]")
LAYER = torch.ops.shardc.layer.default
has_side_effect(LAYER)  # a layer may draw, though nobody uses what it makes


@torch.library.register_fake("shardc::layer")
def _like_described(inputs: list[Tensor], what: str) -> list[Tensor]:
    made = []
    for shape, stride, dtype, device in json.loads(what)[2]:
        made.append(torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device))
    return made


def _call_layer(kind: str, number: int, inputs: Sequence[Tensor], made: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    described = [(tuple(s), stride, str(d).removeprefix("torch."), str(dev)) for s, stride, d, dev, *_ in made]
    return LAYER(list(inputs), json.dumps([kind, number, described]))


class Unfit(Exception):
    """A layer that cannot be traced by itself."""

    def __init__(self, layer: Layer, why: str) -> None:
        super().__init__(why)
        self.layer = layer


Key = tuple[Any, ...]  # (layer, what its inputs look like, the surroundings)


@dataclass
class Layers:
    """The places of one forward graph, and what has been traced for them."""

    gm: GraphModule
    places: list[Place]
    mode: FakeTensorMode
    graph: Graph = field(init=False)
    made: dict[Key, list[tuple[Any, ...]]] = field(default_factory=dict)  # what a layer's outputs look like
    joints: dict[tuple[Key, tuple[Any, ...]], Joint] = field(default_factory=dict)
    keys: dict[int, Key] = field(default_factory=dict)  # by place
    joint_of: dict[int, Joint] = field(default_factory=dict)
    handled: list[tuple[Tensor, int, Layer]] = field(default_factory=list)  # with their counts of writes

    def __post_init__(self) -> None:
        self.graph = with_calls(self.gm.graph, self.places, lambda place: _Call(self, place))

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward, each place one operator."""
        self.handled.clear()
        result = Replay(self.gm, self.graph).run(*args, *kwargs.values())
        for tensor, before, layer in self.handled:
            if writes(tensor) != before:
                raise Unfit(layer, "what goes in or comes out of it is written to elsewhere")
        return result

    def call(self, place: Place, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        key = (place.layer, tuple(about(x) for x in inputs), _surroundings(inputs))
        if key not in self.made:
            self.made[key] = self._dry_run(key)
        self.keys[place.number] = key
        made: Any = _autograd(self, place, self.made[key], *inputs)
        for x in (*inputs, *made):
            if not isinstance(x, FunctionalTensor):
                raise Unfit(place.layer, "it is given what is no traced tensor")
            self.handled.append((x, writes(x), place.layer))
        passed_on = [inputs[i] for i in place.layer.passed_on]
        return (*made, *passed_on[len(_passed_on(key, inputs)) :])

    def backward(self, place: Place, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        key = self.keys[place.number]
        joint = self.joint_of[place.number] = self._joint(key, tuple(None if t is None else about(t) for t in tangents))
        wanted = [joint.gradients.get(i) for i in range(len(place.inputs))]
        described = [about(node.meta["val"]) for node in wanted if node is not None]
        made = iter(_call_layer("backward", place.number, [t for t in tangents if t is not None], described))
        return [None if node is None else next(made) for node in wanted]

    def _fakes(self, key: Key) -> list[Tensor]:
        with aside():
            with self.mode, torch.no_grad():
                fakes = [torch.empty_strided(a[0], a[1], dtype=a[2], device=a[3]) for a in key[1]]
            return [x.requires_grad_(a[4]) for x, a in zip(fakes, key[1], strict=True)]

    def _dry_run(self, key: Key) -> list[tuple[Any, ...]]:
        """What the outputs look like, those passed on included. Refuses what is no function of its inputs."""
        layer, infos, before = key
        if any(conj or neg for *_, conj, neg in infos):
            raise Unfit(layer, "an input is a view that conjugates or negates")
        fakes = self._fakes(key)
        with aside(), functionalizing(self.mode):
            inputs = [functional(x).clone() for x in fakes]
            shapes = [about(x)[:2] for x in inputs]
            with recording():
                outputs = Replay(self.gm, layer.body).run(*inputs)
            if _surroundings(inputs) != before:
                raise Unfit(layer, "it leaves autocast or gradients on or off")
            if any(map(is_changed, inputs)) or [about(x)[:2] for x in inputs] != shapes:
                raise Unfit(layer, "it changes an input in place")
            storages = [x.untyped_storage()._cdata for x in (*inputs, *outputs)]
            if len(set(storages)) < len(storages):
                raise Unfit(layer, "an output is a view of an input, or of another output")
            return [about(x) for x in (*outputs, *_passed_on(key, inputs))]

    def _joint(self, key: Key, tangents: tuple[Any, ...]) -> Joint:
        found = self.joints.get((key, tangents))
        if found is None:
            with aside(), torch.enable_grad():
                gm = joint_graph(partial(self._run, key, tangents), self._fakes(key), None)
            found = self.joints[key, tangents] = Joint.read(gm)
        return found

    def _run(self, key: Key, tangents: tuple[Any, ...], *flat: Tensor) -> tuple[Tensor, ...]:
        """A layer as a program: from its inputs to all that leaves it."""
        layer, _, (grad, *autocasts) = key
        inputs = [x.clone() for x in flat]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, enabled, dtype in autocasts:
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            stack.enter_context(recording())
            outputs = Replay(self.gm, layer.body).run(*inputs)
        outputs = [*outputs, *_passed_on(key, inputs)]
        pairs = zip(outputs, tangents, strict=True)
        return tuple(_leave(x.detach(), 0, ()) if t is None else _leave(x, i, t) for i, (x, t) in enumerate(pairs))

    def expand(self, gm: GraphModule) -> None:
        """Puts what they stand for in the place of the layers' operators."""
        copies = {place.number: _Copy(gm, place) for place in self.places}
        for node in list(gm.graph.nodes):
            if node.target is not LAYER:
                continue
            kind, number, _ = json.loads(node.args[1])
            copy = copies[number]
            with gm.graph.inserting_before(node):
                if kind == "forward":
                    if number not in self.joint_of:  # no gradient comes back to it
                        none = (None,) * len(self.made[self.keys[number]])
                        self.joint_of[number] = self._joint(self.keys[number], none)
                    results = copy.forward(self.joint_of[number], node.args[0])
                else:
                    results = copy.backward(self.joint_of[number], node.args[0])
            for item in list(node.users):
                item.replace_all_uses_with(results[item.args[1]])
                gm.graph.erase_node(item)
            gm.graph.erase_node(node)


class _Call:
    """What stands in the forward graph for a place."""

    __name__ = "layer"

    def __init__(self, layers: Layers, place: Place) -> None:
        self.layers, self.place = layers, place

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.layers.call(self.place, inputs)


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Layers, place: Place, made: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.place = layers, place
        outputs = _call_layer("forward", place.number, inputs, made)
        plain = [x for x, info in zip(outputs, made, strict=True) if not info[4]]
        ctx.mark_non_differentiable(*plain)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        return (None, None, None, *ctx.layers.backward(ctx.place, tangents))


_autograd: Any = _Autograd.apply


class _Leaving(torch.autograd.Function):
    """An output of a layer that is traced by itself: what comes back to it is as it was where the layer stands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int, tangent: tuple[Any, ...]) -> Tensor:
        ctx.number, ctx.tangent = number, tangent
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (*_call_layer("tangent", ctx.number, grads, [ctx.tangent]), None, None)


_leave: Any = _Leaving.apply


class _Copy:
    """A layer's joint graph, copied to one place of the whole."""

    def __init__(self, gm: GraphModule, place: Place) -> None:
        self.gm, self.place = gm, place
        self.of: dict[Node, Any] = {}
        self.numbers: dict[int, str] = {}

    def forward(self, joint: Joint, inputs: Any) -> list[Any]:
        self.of.update((node, inputs[i]) for i, node in joint.primals.items())
        self._copy(joint, joint.nodes[: _border(joint)])
        return [self.of[joint.results[i]] for i in range(len(joint.results))]

    def backward(self, joint: Joint, tangents: Any) -> list[Any]:
        """The gradients there are, in order of the inputs; a tangent for each output that has one."""
        given = dict(zip(sorted(joint.tangents), tangents, strict=True))
        late = joint.nodes[_border(joint) :]
        for node in late:
            if node.target is LAYER:
                self.of.update((item, given[json.loads(str(node.args[1]))[1]]) for item in node.users)
        self._copy(joint, late)
        return [self.of[joint.gradients[i]] for i in sorted(joint.gradients) if joint.gradients[i] is not None]

    def _copy(self, joint: Joint, nodes: Sequence[Node]) -> None:
        graph = self.gm.graph
        for old in nodes:
            if old.op == "get_attr":
                self.of[old] = graph.get_attr(self._constant(getattr(joint.gm, str(old.target))))
            elif old.op != "call_function" or old in self.of or old in joint.stands_for or old.target is LAYER:
                continue
            else:
                args, kwargs = torch.fx.map_arg((old.args, old.kwargs), lambda n: self.of[joint.resolve(n)])
                if old.target is MARK:
                    args = (args[0], self.place.names.keys[str(args[1])])
                self.of[old] = graph.create_node("call_function", old.target, args, kwargs)
            self.of[old].meta = self._meta(old.meta)

    def _constant(self, value: Any) -> str:
        """One of its own for each place, as each place makes it anew."""
        name = f"_layer_constant{len(vars(self.gm))}"
        setattr(self.gm, name, value.clone() if isinstance(value, Tensor) else value)
        return name

    def _meta(self, meta: dict[str, Any]) -> dict[str, Any]:
        new, names = dict(meta), self.place.names
        if meta.get("stack_trace"):
            new["stack_trace"] = self._line(meta["stack_trace"])
        for key in ("nn_module_stack", "fwd_nn_module_stack"):
            if meta.get(key):
                new[key] = names.owners.get(tuple(meta[key]), meta[key])
        for key in ("seq_nr", "ac_graph_id"):  # what shares one in the layer shares one here, and with nothing else
            if key in meta:
                new[key] = f"{meta[key]}.{self.place.number}"
        return new

    def _line(self, text: str) -> str:
        lines = self.place.names.lines
        bare = text.removesuffix(SUMMED)
        if bare in lines:
            return lines[bare] + text[len(bare) :]
        if innermost(text) is not None and any(first != here for first, here in lines.items()):
            raise Unfit(self.place.layer, "one of its operators is from a line of none of its calls")
        return text


def _border(joint: Joint) -> int:
    """Where backward begins."""
    late = (i for i, n in enumerate(joint.nodes) if n.op == "call_function" and n.meta.get(TAG) == "is_backward")
    return next(late, len(joint.nodes))


def _passed_on(key: Key, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs whose gradient goes through the layer. Where gradients are off they would lose theirs in it."""
    layer, _, (grad, *_) = key
    return [inputs[i] for i in layer.passed_on] if grad else []


def _surroundings(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Whether gradients are on, and autocast, for the devices at hand."""
    devices = sorted({"cpu", *(x.device.type for x in inputs)})
    autocasts = ((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    return (torch.is_grad_enabled(), *autocasts)


@contextmanager
def _left_as_found(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Autocast and gradients are as before, though a trace ends in the middle of a region."""
    grad, *autocasts = _surroundings(inputs)
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        while torch.autocast_decrement_nesting() >= depth:
            pass
        torch.set_grad_enabled(grad)
        for device, enabled, dtype in autocasts:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def export_layers(program: Program, flat: Sequence[Tensor], gm: GraphModule, context: TracingContext) -> GraphModule:
    """The joint graph of a captured forward, each layer of it traced once where that can be."""
    numbers = all(isinstance(n, int) for x in flat for n in x.shape)
    mode = context.fake_mode
    places = repeats(gm.graph) if numbers else []
    while places and mode is not None:
        layers = Layers(gm, places, mode)
        program.call = layers.replay
        try:
            with _left_as_found(flat):
                joint = joint_graph(program.run, flat, context)
                layers.expand(joint)
            return joint
        except Unfit as unfit:
            log.info("a layer is traced in place: %s", unfit)
            places = [place for place in places if place.layer is not unfit.layer]
    program.call = replay(gm)
    return joint_graph(program.run, flat, context)
