"""Calls that prove the rules of reductions, norms, losses, attention, convolution, sorting, chance and ours."""

from tests.rules import cases_norm, cases_ours, cases_reduce, cases_space

CASES = [*cases_reduce.CASES, *cases_norm.CASES, *cases_space.CASES, *cases_ours.CASES]
