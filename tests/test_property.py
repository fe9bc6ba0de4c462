"""Random programs under random plans equal one device: outputs, every gradient, and every value in between."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from tests.agree import Once, Refused, agrees
from tests.conftest import FUZZ
from tests.draw_plans import ask
from tests.draws import program

PLANS = 3  # tracing takes longest: each program is traced once and compiled for so many plans


@pytest.mark.slow
@pytest.mark.timeout(0 if FUZZ else 600)
@settings(
    max_examples=max(1, (FUZZ or 200) // PLANS),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(st.randoms(use_true_random=False))
def test_a_random_program_equals_one_device(random: Random):
    drawn = program(random)
    note(drawn)
    once = Once()
    for _ in range(PLANS):
        asked = ask(random, drawn)
        note(asked)
        try:
            agrees(drawn.model(), drawn.tensors(), *asked.values(), tracer=once)
        except Refused as refused:
            event(f"refused: {refused}")
