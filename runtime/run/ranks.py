"""This process as a rank of a mesh: its groups, its place, and what a program needs to run on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.fx import GraphModule, Node

from shardc.compiler.ir.collectives import COLLECTIVES
from shardc.compiler.ir.moves import Call, move_of
from shardc.compiler.ir.node import nbytes, spec, specs, val
from shardc.compiler.ir.owned import apart
from shardc.compiler.spec.mesh import Mesh, place
from shardc.compiler.spec.spec import Spec, to_placements
from shardc.runtime.run.backward_half import BackwardHalf
from shardc.runtime.run.bind import bind_program
from shardc.runtime.run.compiled_stretches import Stretches
from shardc.runtime.run.engines import ready
from shardc.runtime.shards import cut
from shardc.runtime.wire.distribute import as_dtensor, broadcast, gather_whole, local_of
from shardc.runtime.wire.groups import Groups
from shardc.runtime.wire.handshake import Calls, agree, calls_of
from shardc.runtime.wire.line import Line
from shardc.runtime.wire.meeting import Sums, carried

Around = Callable[[Sequence[Tensor]], AbstractContextManager[None]]


@register_sharding(torch.ops.aten._is_any_true.default)
def _whole(x: Any) -> Any:
    """What anomaly mode asks of every gradient, and DTensor has no answer to by itself."""
    return [([Replicate()], [Replicate()])]


@dataclass(frozen=True)
class Ranks:
    """The real ranks of a torch DeviceMesh, seen from one of them."""

    device_mesh: DeviceMesh

    @cached_property
    def mesh(self) -> Mesh:
        return Mesh.of(self.device_mesh)

    @cached_property
    def groups(self) -> Groups:
        return Groups(self.device_mesh)

    @property
    def coords(self) -> dict[str, int]:
        """This rank's place in the mesh."""
        return self.groups.coords

    def agree(self, text: str, what: str) -> None:
        """Make sure that every rank holds the same text. Raises RankMismatchError on every rank otherwise."""
        if self.mesh.size > 1:
            agree(text, self.groups, what, call=self.calls.entered)

    @property
    def calls(self) -> Calls:
        """The count of calls that these ranks make together, whatever the module."""
        return calls_of(self.groups.ranks)

    def bind(
        self,
        gm: GraphModule,
        stretches: Stretches | None = None,
        kept: int | None = None,
        changed: Collection[int] = (),
    ) -> GraphModule:
        """A graph of symbolic collectives as this rank runs it. stretches: compile what is between them. kept,
        changed: see `apart`."""
        bound = bind_program(
            gm, self.mesh, self.coords, self.groups, self.calls, stretches is None, apart(gm, kept, changed)
        )
        return bound if stretches is None else stretches.compiled(bound)

    def wrapper(self, spec: Spec) -> Callable[[Tensor], Tensor]:
        """What labels a local gradient with its global layout."""
        placements = to_placements(spec, self.mesh)
        if placements is None:
            raise ValueError(f"torch has no placements for {spec}")
        shape = torch.Size(spec.shape)
        stride = torch.empty(spec.shape, device="meta").stride()
        mesh, label = self.device_mesh, None

        def wrap(local: Tensor) -> Tensor:
            # from_local costs several operator calls; its label can be put on the next tensors as it is. __init__
            # matters to torch.export alone, and its guard against Dynamo takes as long as __new__.
            nonlocal label
            if label is None:
                label = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)._spec
            return DTensor.__new__(DTensor, local, label, requires_grad=False)

        return wrap

    def relay(self, param: nn.Parameter, before: Spec, after: Spec) -> None:
        """Store a parameter in another layout, in place: the object, which an optimizer may hold, stays the same."""
        local = self.moved(local_of(param.detach()), before, after)
        made = nn.Parameter(as_dtensor(local, after, self.device_mesh), requires_grad=param.requires_grad)
        torch.utils.swap_tensors(param, made)

    def moved(self, local: Tensor, before: Spec, after: Spec) -> Tensor:
        """This rank's piece in another layout. All ranks pass theirs."""
        whole = gather_whole(local, before, self.device_mesh, self.coords)
        return cut(whole, after, self.mesh, self.coords).contiguous()

    @cached_property
    def lines(self) -> dict[str, Line]:
        """The ranks along each mesh dim, by its name."""
        return {axis: self.line(axis) for axis in self.mesh.names}

    def line(self, axis: str) -> Line:
        """The ranks along a mesh dim, or a part of one."""
        return Line(axis, self.mesh[axis], place(self.coords, axis), self.groups.get(axis), self.calls)

    def moving(self, half: GraphModule, what: str, shared: Mapping[str, Sequence[int]]) -> Around:
        """What goes around each run of a half on these inputs. what: its name. shared: by mesh dim, the inputs whose
        ranks there are given the same."""
        moves = [move for node in half.graph.nodes if (move := move_of(node)) is not None]
        lines = [self.line(axis) for axis in dict.fromkeys(m.axis for m in moves if m.target in COLLECTIVES)]
        lines = [line for line in lines if line.size > 1]
        first = {m.axis: m for m in reversed(moves)}
        large = {
            axis
            for axis, move in first.items()
            if self.mesh[axis] > 1 and not _bytes_of(move) <= carried(self.mesh[axis])
        }

        def around(inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
            if not lines:
                return nullcontext()
            given = {a: Sums.of([local_of(inputs[i]) for i in at]) for a, at in shared.items()}
            return self.calls.moving(lines, what, large, given)

        return around

    @contextmanager
    def drawing_alike(self) -> Iterator[None]:
        """Draw as the mesh's first rank does, from where its generators stand; those of the others stay where they
        are, so each rank can go on drawing by itself outside."""
        mine = _generators(self.device_mesh.device_type)
        agreed = [state.to(self.device_mesh.device_type, copy=True) for state in mine]
        for state in agreed:
            broadcast(state, self.device_mesh, 0)
        _set_generators(self.device_mesh.device_type, [state.cpu() for state in agreed])
        try:
            yield
        finally:
            if any(self.coords.values()):
                _set_generators(self.device_mesh.device_type, mine)

    def backward(
        self, half: GraphModule, late: Sequence[str], program: str, stretches: Stretches | None
    ) -> BackwardHalf:
        """A backward half as this rank runs it. late: names of what does not come from forward. program: a digest."""
        moves = [move.target for node in half.graph.nodes if (move := move_of(node)) is not None]
        meet = nullcontext if {*moves}.isdisjoint(COLLECTIVES) else self._meeting(program, late, half)
        return BackwardHalf(half, len(late), lambda gm: ready(self.bind(gm, stretches)), self._zeros, meet)

    def _zeros(self, node: Node) -> Tensor:
        shape = spec(node).local_shape(self.mesh, self.coords)
        return torch.zeros(shape, dtype=val(node).dtype, device=val(node).device)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around what moves values outside of programs, and all ranks must call. what: its name."""
        self.calls.number += 1
        lines = [line for line in self.lines.values() if line.size > 1]
        with self.calls.moving(lines, what, large=self.lines):
            for line in lines:
                line.settle()
            yield

    def _meeting(
        self, program: str, late: Sequence[str], half: GraphModule
    ) -> Callable[[tuple[int, ...]], AbstractContextManager[None]]:
        """What goes around each run of a backward, given what it does without: all ranks must do without the same."""
        calls, last = self.calls, ()
        around = self.moving(half, f"backward of program {program[:12]}", {})

        def meet(missing: tuple[int, ...]) -> AbstractContextManager[None]:
            nonlocal last
            if missing == last:
                calls.number += 1
                return around(())
            used = [name for i, name in enumerate(late) if i not in missing]
            with calls.entering():
                self.agree(f"{program}\nbackward from {', '.join(used)}", "what the loss uses of the results")
            last = missing
            return around(())

        return meet


def _bytes_of(move: Call) -> float:
    """Of the whole values that a collective moves, which all ranks know alike; where data decides it, no number."""
    moved = [move.args[0]] if isinstance(move.args[0], Node) else move.args[0]
    return math.nan if any(s.of_data for node in moved for s in specs(node)) else sum(map(nbytes, moved))


def _generators(device_type: str) -> list[Tensor]:
    """The states of the generators that programs on this kind of device draw from."""
    states = [torch.get_rng_state()]
    return states if device_type == "cpu" else [*states, torch.get_device_module(device_type).get_rng_state()]


def _set_generators(device_type: str, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device_type).set_rng_state(state)
