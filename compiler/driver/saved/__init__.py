"""Programs and traces in files."""
