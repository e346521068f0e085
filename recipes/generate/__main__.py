"""``python recipes/generate``: writes the recipes, docs/keys.md, and the generated tables of other pages.

Run this command after you change a key, the table of backbones or the layout of heads.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # the repository, so that this folder is `recipes.generate`

from recipes.generate import coverage, recipes, reference  # noqa: E402

(ROOT / "docs/keys.md").write_text(reference.page(), encoding="utf-8")
coverage.write_table(ROOT / "docs/backbones.md")
recipes.write_index(ROOT / "recipes/README.md")
print(f"{len(recipes.write_recipes(ROOT / 'recipes'))} recipes written")
