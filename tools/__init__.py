"""The tools: command line, graph viewer, pass printer and documentation maker."""
