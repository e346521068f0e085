"""Writes the generated recipes and ``docs/keys.md``: ``python recipes/generate``, after a change of table or keys."""

import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]
sys.path.append(str(RECIPES))

from generate import reference  # noqa: E402
from generate.recipes import write_index, write_recipes  # noqa: E402

(RECIPES.parent / "docs/keys.md").write_text(reference.page(), encoding="utf-8")
write_index(RECIPES / "README.md")
print(f"{len(write_recipes(RECIPES))} recipes written")
