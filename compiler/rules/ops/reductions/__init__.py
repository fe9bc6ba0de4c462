"""Sums, extremes, moments and softmax."""
