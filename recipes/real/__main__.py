"""``python recipes/real``: runs HeRA on SmolLM2-135M, and writes the results as a page (docs/real_model.md)."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, so that this folder is `recipes.real`

from recipes.real.run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
