"""Fixtures: a random model whose answers are not empty, and a few questions of the demo."""

import json
import shutil
from pathlib import Path

import pytest

from llamafactory_hera.backbones.build import build_backbone

from ..backbones.tiny import save_language_model, save_tower


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ``build`` made."""
    root = tmp_path_factory.mktemp("llama3")
    tower = save_tower("siglip", root / "siglip")
    return build_backbone(str(save_language_model("llama3", root / "llm")), str(tower), root / "built").folder


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """A folder with 24 of the demo's questions."""
    shutil.copytree(world / "hera_demo/data", tmp_path / "data")
    file = tmp_path / "data/demo_questions.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:24]))
    return tmp_path / "data"
