"""Every call that proves a rule."""

from tests.rules.cases import norms, ours, reductions, shapes_and_products, windows_and_attention

CASES = [
    *shapes_and_products.CASES,
    *reductions.CASES,
    *norms.CASES,
    *windows_and_attention.CASES,
    *ours.CASES,
]
