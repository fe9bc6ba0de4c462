"""From a traced graph to layouts on every value."""
