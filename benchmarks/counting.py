"""A process group that counts what it is asked to move, and has gloo move it.

Bytes are per rank, as ring algorithms send them: all_reduce 2 (n-1)/n of the value, all_gather (n-1) times the piece,
reduce_scatter (n-1)/n of the value, all_to_all what goes to others, broadcast the value once.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor

NAME = "counting"


class Counting(dist.ProcessGroup):
    """bytes, calls: by kind of collective, since `clear`."""

    bytes: Counter = Counter()
    calls: Counter = Counter()

    def __init__(self, made: Any, _: Any = None) -> None:
        """made: what torch says of the group to be."""
        super().__init__(made.group_rank, made.group_size)
        self._gloo = dist.ProcessGroupGloo(made.store, made.group_rank, made.group_size, made.timeout)
        self._n = made.group_size
        self._name, self._store = made.group_id, made.store

    @classmethod
    def clear(cls) -> None:
        cls.bytes.clear()
        cls.calls.clear()

    def _count(self, kind: str, sent: float) -> None:
        assert sent == int(sent)
        self.bytes[kind] += int(sent)
        self.calls[kind] += 1

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        self._count("all_reduce", 2 * (self._n - 1) * _size(tensors) / self._n)
        return self._gloo.allreduce(tensors, *_given(opts))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        self._count("all_gather", (self._n - 1) * _size(inputs))
        return self._gloo.allgather(outputs, inputs, *_given(opts))

    def _allgather_base(self, output: Tensor, piece: Tensor, opts: Any = None) -> Any:
        self._count("all_gather", (self._n - 1) * _size([piece]))
        return self._gloo._allgather_base(output, piece, *_given(opts))

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, opts: Any = None) -> Any:
        self._count("reduce_scatter", (self._n - 1) * _size([whole]) / self._n)
        return self._gloo._reduce_scatter_base(output, whole, *_given(opts))

    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base

    def alltoall_base(self, output: Tensor, given: Tensor, to_: list[int], from_: list[int], opts: Any = None) -> Any:
        """to_: rows that come from each; from_: rows that go to each. Equal ones where there are none."""
        rows = from_ or [given.shape[0] // self._n] * self._n
        row = _size([given]) // max(given.shape[0], 1)
        self._count("all_to_all", row * sum(n for i, n in enumerate(rows) if i != self.rank()))
        return self._gloo.alltoall_base(output, given, to_, from_, *_given(opts))

    all_to_all_single = alltoall_base

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        self._count("broadcast", _size(tensors))
        return self._gloo.broadcast(tensors, *_given(opts))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        self._count("scatter", sum(_size(pieces) for pieces in inputs))
        return self._gloo.scatter(outputs, inputs, *_given(opts))

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier(*_given(opts))

    def getBackendName(self) -> str:
        return NAME

    def get_group_store(self) -> Any:
        return self._store

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name


def register() -> None:
    """Make it known: `init_process_group("counting", ...)`."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, Counting, extended_api=True, devices=["cpu"])


def _given(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)


def _size(tensors: list[Tensor]) -> int:
    return sum(math.prod(x.shape) * x.element_size() for x in tensors)
