"""Disagreements become explicit, then collectives."""
