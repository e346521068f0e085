"""``python recipes/study``: runs or resumes a study, and writes its report (docs/study.md)."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, so that this folder is `recipes.study`

from recipes.study.run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
