"""Writes every generated recipe beside this folder: ``python recipes/generate``, after a change of the table."""

import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]
sys.path.append(str(RECIPES))

from generate.recipes import write_index, write_recipes  # noqa: E402

write_index(RECIPES / "README.md")
print(f"{len(write_recipes(RECIPES))} recipes written")
