"""Local ranks, one process each."""
