"""Whether an optimizer steps on the pieces of a parameter as it does on the whole: found by trying it on small ones.

AdamW does. Muon, Adafactor, LAMB and their like look at whole matrices, or at their norms: on pieces they would step
otherwise, on every rank differently, and nothing would show it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SIZE = 6  # of every dim of what is tried: cut in two along each
STEPS = 3
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def looks_at_the_whole(make: Callable[[Sequence[nn.Parameter]], Any], parameters: Sequence[Tensor]) -> list[bool]:
    """Of each parameter whether the optimizer that `make` gives steps on its pieces otherwise than on the whole.

    make is called with as many parameters, of as many dims, as it will be. What it cannot be tried on counts as False.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            shapes = [(SIZE,) * p.dim() for p in parameters]
            values = [[torch.randn(n) for n in shapes] for _ in range(STEPS + 1)]  # a start, and gradients
            wanted = _stepped(make, values)
            found = [False] * len(shapes)
            for dim in range(max((len(n) for n in shapes), default=0)):
                for half in (0, 1):
                    pieces = _stepped(make, [[_piece(x, dim, half) for x in step] for step in values])
                    pairs = zip(wanted, pieces, strict=True)
                    differ = [not torch.allclose(_piece(w, dim, half), p, **CLOSE) for w, p in pairs]
                    found = [a or b for a, b in zip(found, differ, strict=True)]
            return found
    except Exception as error:  # the user's own code: what it says of these it says again, or not, of the real ones
        log.info("the optimizer was not tried on pieces: %s", error)
        return [False] * len(parameters)


def _piece(x: Tensor, dim: int, half: int) -> Tensor:
    return x.chunk(2, dim)[half] if dim < x.dim() else x


def _stepped(make: Callable[[Sequence[nn.Parameter]], Any], values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    start, *gradients = values
    held = [nn.Parameter(x.clone()) for x in start]
    optimizer = make(held)
    for step in gradients:
        for parameter, gradient in zip(held, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in held]
