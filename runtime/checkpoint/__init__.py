"""Checkpoints and files of weights."""
