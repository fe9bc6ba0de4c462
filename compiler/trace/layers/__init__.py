"""Layers that repeat are traced once."""
