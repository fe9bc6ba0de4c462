"""A finished program looked at: what it moves, holds and computes, and why."""
