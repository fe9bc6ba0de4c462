"""How parameters come to their values."""
