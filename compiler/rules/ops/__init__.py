"""What operators mean, one file a family."""
