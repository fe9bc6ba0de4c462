"""What a collective costs: the bytes that a rank puts on the wire, and the seconds that takes.

Ring algorithms over n ranks, in steps of a piece each: all_reduce takes 2 (n-1) of them, every other collective n-1
(Thakur, Rabenseifner, Gropp 2005).
"""

from __future__ import annotations

import torch

ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "fetch": 1}
LATENCY = 1024.0  # a collective's fixed cost in bytes: of two ways that move as much, the shorter wins
LOCAL = 1.0  # a move within a rank is nearly free
# Of this many bytes on, copying costs more than another collective. On gloo and CPU, 2 ranks on 2 cores, a message
# takes 0.3 ms and a MiB copied to a bucket of 25 MiB 0.24 ms; of 0.5, 1, 2, 4 and 25 MiB this one gave the shortest
# step.
# Elsewhere it is an estimate that nobody has measured: 20 us a message, 1 TB/s.
WORTH_A_MESSAGE = {"cpu": 2**20}
ELSEWHERE = 20 * 2**20


def wire_bytes(kind: str, nbytes: float, n: int) -> float:
    """Bytes that one rank sends over n ranks. nbytes: of n equal pieces: of what is reduced, what is gathered, or what
    one rank deals out."""
    return ROUNDS[kind] * (n - 1) * nbytes / n


def seconds(kind: str, sent: float, n: int, latency: float, rate: float) -> float:
    """How long so many bytes a rank take. latency: seconds a step; rate: bytes a second."""
    return ROUNDS[kind] * (n - 1) * latency + sent / rate


def price(kind: str, nbytes: float, n: int) -> float:
    """What a move costs beside others, in bytes, where no machine is known; nbytes as in `wire_bytes`."""
    return LATENCY + wire_bytes(kind, nbytes, n) if kind in ROUNDS else LOCAL


def worth_a_message(device: torch.device) -> int:
    """From how many bytes on a tensor of this device had better travel by itself than be copied to others."""
    return WORTH_A_MESSAGE.get(device.type, ELSEWHERE)
