from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.runner import ROOT


@pytest.fixture(scope="session")
def folder() -> Path:
    """The repository's ``recipes/`` folder."""
    return ROOT / "recipes"


@pytest.fixture(scope="session")
def values(folder: Path) -> dict[str, dict[str, Any]]:
    """The keys of every training recipe in ``recipes/*.yaml`` and ``recipes/ablations``, by the recipe's name."""
    files = [*folder.glob("*.yaml"), *folder.glob("ablations/*.yaml")]
    return {
        file.relative_to(folder).with_suffix("").as_posix(): yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in files
        if not file.stem.endswith("_calibrate")
    }
