"""Random programs under random plans equal one device: outputs, every gradient, and every value in between."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.agree import Refused, agrees, traced_once
from tests.conftest import FUZZ
from tests.draws import asked, programs

PLANS = 3  # tracing takes longest: each program is traced once and compiled for so many plans


@pytest.mark.slow
@settings(
    max_examples=FUZZ or 70,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(st.data())
def test_a_random_program_equals_one_device(data: st.DataObject):
    drawn = data.draw(programs())
    with traced_once():
        for _ in range(PLANS):
            what = data.draw(asked(drawn))
            try:
                agrees(drawn.model(), drawn.tensors(), *what.values())
            except Refused as refused:
                event(f"refused: {refused}")
