"""Replicas of a module in one process."""
