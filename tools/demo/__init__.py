"""`shardc demo`."""
