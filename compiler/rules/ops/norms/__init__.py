"""Normalisations: of batches, groups and layers."""
