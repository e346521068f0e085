"""The recipes in the repository, and the host's parser."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def folder() -> Path:
    """The folder ``recipes/`` of the repository."""
    return ROOT / "recipes"


@pytest.fixture(scope="session")
def values(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> keys of every generated recipe, read from its file."""
    others = ("demo_", "_calibrate")  # written by hand
    found = (file for file in folder.rglob("*.yaml") if file.parent.name != "real")
    files = [file for file in found if not any(part in file.name for part in others)]
    return {
        file.relative_to(folder).with_suffix("").as_posix(): yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in files
    }
