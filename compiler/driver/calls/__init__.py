"""A call of a module: what it is found by, how its arguments lie, and the programs kept for it."""
