"""Calls that prove the rules of reductions, norms, losses, attention, convolution, sorting and chance."""

from tests.rules import cases_norm, cases_reduce, cases_space

CASES = [*cases_reduce.CASES, *cases_norm.CASES, *cases_space.CASES]
