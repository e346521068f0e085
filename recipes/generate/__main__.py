"""``python recipes/generate``: writes the training recipes, their table in recipes/README.md, and docs/keys.md.

Run it after changing a key or the table of backbones.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # the repository, so that this folder is `recipes.generate`

from recipes.generate import recipes, reference  # noqa: E402

(ROOT / "docs/keys.md").write_text(reference.page(), encoding="utf-8")
recipes.write_index(ROOT / "recipes/README.md")
print(f"{len(recipes.write_recipes(ROOT / 'recipes'))} recipes written")
