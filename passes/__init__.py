"""Passes over the graph, one file each; `pipeline` is the list."""
