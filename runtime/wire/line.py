"""The ranks along one mesh dim, as one of them sees them: who is there, whether they are in step, what to wait for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shardc.compiler.errors import RankFailure, RankMismatchError
from shardc.runtime.wire.handshake import Calls
from shardc.runtime.wire.meeting import About, Carried, Door, carrying, sent_alone

PATIENCE = timedelta(seconds=2)  # before a rank looks whether the others are elsewhere


class Line:
    """The ranks along one mesh dim as this rank sees them. index: its own place among them.

    group may be None only where the rank is alone. calls: those that the ranks make together, to see that they are in
    step, and where the others are when they let this rank wait.
    """

    def __init__(
        self, axis: str, size: int, index: int, group: dist.ProcessGroup | None, calls: Calls | None = None
    ) -> None:
        self.axis, self.size, self.index, self.group, self.calls = axis, size, index, group, calls
        self.door = calls.doors.setdefault(axis, Door()) if calls is not None else Door()
        config = dist.get_backend_config(group) if group is not None and size > 1 else ""
        self._backends = dict(part.split(":") for part in config.split(",") if part)

    def backend(self, x: Tensor) -> str:
        """What carries a tensor of this device; empty where it is not known."""
        return self._backends.get(x.device.type, "")

    def open(self, about: About, alone: bool) -> None:
        """Tell the others what this rank is about to do here: by a message of its own, or with the next one."""
        if self.group is None or self.size == 1 or {*self._backends.values()} != {"gloo"}:
            return
        self.door.issued = 0
        if alone:
            self.door.under_way = sent_alone(self.group, self.size, self.index, about)
        else:
            self.door.to_say = about

    def issued(self, op: Any, *args: Any) -> Any:
        """What is to be waited for, of a collective along this line."""
        self.door.issued += 1
        about, self.door.to_say = self.door.to_say, None
        if about is None or op not in (dist.all_to_all_single, dist.all_gather_single) or not args[0].is_cpu:
            if about is not None:
                self.open(about, alone=True)
                self.settle()
            return op(*args, group=self.group, async_op=True)
        self.door.under_way = carrying(self.group, self.size, self.index, about, op, *args)
        return self.door.under_way

    def arrived(self, work: Any, sent: Tensor) -> None:
        """Wait for a collective, and see what came with it."""
        if isinstance(work, Carried):
            self.settle()
        else:
            self.finish(work, sent)

    def settle(self) -> None:
        """See that the others are about to do the same, before anything else moves. Raises RankMismatchError where they
        are not."""
        if self.door.under_way is None or self.group is None or self.calls is None:
            return
        try:
            said = self.door.settle(self.finish)
        except RankMismatchError:
            raise
        except RuntimeError as error:
            raise self.lost("the message by which a call begins", error) from error
        if said:
            raise self.calls.out_of_step(str(self), dist.get_process_group_ranks(self.group), said)

    def finish(self, work: Any, sent: Tensor) -> None:
        """Wait for what moves, and look where the others are while it does not."""
        if self.calls is None or self.backend(sent) != "gloo":  # elsewhere a wait does not block
            work.wait()
            return
        while True:
            try:
                work.wait(PATIENCE)
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            self.calls.look()

    def lost(self, what: str, error: RuntimeError) -> RankFailure:
        return RankFailure(f"rank {dist.get_rank()} could not finish {what} over {self}: {error}")

    def __str__(self) -> str:
        ranks = dist.get_process_group_ranks(self.group) if self.group is not None else []
        return f"{self.axis} (ranks {', '.join(map(str, ranks))})"
