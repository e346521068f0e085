"""Tiny checkpoints, saved once."""

from pathlib import Path

import pytest

from .tiny import FAMILIES, TOWERS, save_language_model, save_tower


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a language model or tower of ``tiny.py`` -> its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_language_model(name, root / name) for name in FAMILIES} | {
        name: save_tower(name, root / name) for name in TOWERS
    }
