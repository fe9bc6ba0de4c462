"""A finished program runs: bound to one rank, or all ranks simulated here."""
