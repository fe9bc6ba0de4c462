"""The passes, one rewriting step per file; `pipeline.py` lists them."""
