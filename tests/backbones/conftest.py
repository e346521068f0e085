"""Fixtures: tiny checkpoints, which are saved once, and `build` with these checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llamafactory_hera.backbones.build import BuiltModel, build_backbone

from .tiny import FAMILIES, TOWERS, save_language_model, save_tower

Build = Callable[..., BuiltModel]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Maps the name of a language model or vision encoder of ``tiny.py`` to its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {name: save_language_model(name, root / name) for name in FAMILIES}
    return folders | {name: save_tower(name, root / name) for name in TOWERS}


@pytest.fixture
def build(checkpoints: dict[str, Path], tmp_path: Path) -> Build:
    """Returns a function that builds a model in the ``built`` folder from checkpoint names or folders."""

    def run(llm: str | Path = "qwen3", tower: str | Path = "siglip", output: str | Path = "built", **options):
        folders = [str(checkpoints.get(name, name)) for name in (llm, tower)]
        return build_backbone(*folders, tmp_path / output, **options)

    return run
