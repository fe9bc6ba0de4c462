"""Factors meet mesh dims: layouts of operands decide layouts of results."""
