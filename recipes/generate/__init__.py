"""Writes the training recipes and their table in ``recipes/README.md``: ``python recipes/generate``."""
