"""The graph: its typed view, what its ends are, symbolic collectives, its text and its halves."""
