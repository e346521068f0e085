"""Writes the training recipes, their table in ``recipes/README.md``, and all keys: ``python recipes/generate``."""
