"""This process as a rank of a mesh: its groups, its place, and what a program needs to run on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
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
from shardc.compiler.ir.moves import move_of
from shardc.compiler.ir.node import spec, val
from shardc.compiler.ir.owned import apart
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Spec, to_placements
from shardc.runtime.run.backward_half import BackwardHalf
from shardc.runtime.run.bind import bind_program
from shardc.runtime.run.compiled_stretches import Stretches
from shardc.runtime.run.engines import ready
from shardc.runtime.shards import cut
from shardc.runtime.wire.distribute import as_dtensor, broadcast, gather_whole, local_of
from shardc.runtime.wire.groups import Groups
from shardc.runtime.wire.handshake import Calls, agree, calls_of
from shardc.runtime.wire.wire import Line


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
            gm, self.mesh, self.coords, self.groups, self.calls.look, stretches is None, apart(gm, kept, changed)
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
        look = self.calls.look
        return {a: Line(a, self.mesh[a], self.coords[a], self.groups.get(a), look) for a in self.mesh.names}

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
        meet = None if {*moves}.isdisjoint(COLLECTIVES) else self._meeting(program, late)
        return BackwardHalf(half, len(late), lambda gm: ready(self.bind(gm, stretches)), self._zeros, meet)

    def _zeros(self, node: Node) -> Tensor:
        shape = spec(node).local_shape(self.mesh, self.coords)
        return torch.zeros(shape, dtype=val(node).dtype, device=val(node).device)

    def _meeting(self, program: str, late: Sequence[str]) -> Callable[[tuple[int, ...]], None]:
        """What is told before each run of a backward what it does without: all ranks must do without the same."""
        calls, last = self.calls, ()

        def meet(missing: tuple[int, ...]) -> None:
            nonlocal last
            if missing == last:
                calls.number += 1
                return
            used = [name for i, name in enumerate(late) if i not in missing]
            with calls.entering():
                self.agree(f"{program}\nbackward from {', '.join(used)}", "what the loss uses of the results")
            last = missing

        return meet


def _generators(device_type: str) -> list[Tensor]:
    """The states of the generators that programs on this kind of device draw from."""
    states = [torch.get_rng_state()]
    return states if device_type == "cpu" else [*states, torch.get_device_module(device_type).get_rng_state()]


def _set_generators(device_type: str, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device_type).set_rng_state(state)
