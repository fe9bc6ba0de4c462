"""What a collective costs."""

import pytest

from shardc.compiler.spec.cost import LATENCY, ROUNDS, price, seconds, wire_bytes


@pytest.mark.parametrize(
    ("kind", "sent"), [("all_gather", 75), ("reduce_scatter", 75), ("all_to_all", 75), ("all_reduce", 150)]
)
def test_bytes_one_of_four_ranks_sends(kind: str, sent: int):
    assert wire_bytes(kind, 100, 4) == sent


@pytest.mark.parametrize("kind", ROUNDS)
def test_one_rank_sends_nothing(kind: str):
    assert wire_bytes(kind, 100, 1) == seconds(kind, 0, 1, 1.0, 1.0) == 0


def test_seconds_are_those_of_each_step_and_of_the_bytes():
    assert seconds("all_reduce", 150, 4, 2.0, 10.0) == 6 * 2.0 + 15.0
    assert seconds("all_gather", 75, 4, 2.0, 10.0) == 3 * 2.0 + 7.5


def test_of_two_ways_that_move_as_much_the_shorter_is_cheaper():
    two = price("reduce_scatter", 100, 4) + price("all_gather", 100, 4)
    assert price("all_reduce", 100, 4) + LATENCY == two
    assert price("local_slice", 100, 4) < LATENCY
