"""Calls that prove the rules of shardc's own operators: checks, seeds, losses of texts, least squares."""

from __future__ import annotations

import torch

from shardc.compiler.rules.checks import CHECK, CHECK_TRUE
from shardc.compiler.rules.ops.losses.ctc import CTC, CTC_BACKWARD
from shardc.compiler.rules.ops.lstsq import LSTSQ
from shardc.compiler.rules.ops.random.bits import SEED
from tests.rules.operands import Case, case, positive, real, whole


def _texts() -> list[Case]:
    """Texts one under another, and end to end; more of them than ranks, and fewer."""
    out = []
    for texts in (1, 2, 3, 5):
        steps = real(9, texts, 4).log_softmax(-1)
        lengths = torch.full((texts,), 9), whole(3, texts) + 1
        for targets in (whole(3, texts, 3) + 1, whole(3, int(lengths[1].sum())) + 1):
            call = (steps, targets, *lengths, 0, True)
            out += [case(CTC, *call), case(CTC_BACKWARD, positive(texts), *call)]
    return out


def _least_squares() -> list[Case]:
    out = []
    for batch in ((), (1,), (5, 2)):
        for m, n in ((4, 3), (3, 4)):
            a, b = real(*batch, m, n).cos(), real(*batch, m, 2)
            out += [case(LSTSQ, a, b, None, driver) for driver in (None, "gels", "gelsy", "gelsd")]
    return out


CASES: list[Case] = [
    case(CHECK, torch.zeros(5, dtype=torch.int32), "linalg.inv", False),
    case(CHECK_TRUE, torch.tensor(True), "ValueError", "no"),
    case(SEED, torch.device("cpu")),
    *_texts(),
    *_least_squares(),
]
