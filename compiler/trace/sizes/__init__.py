"""Sizes that are symbols, and sizes that data decides."""
