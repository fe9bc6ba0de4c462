"""What runs passes, and what must hold of a graph at each stage."""
