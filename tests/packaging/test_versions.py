"""Both distributions have one version, wherever it is written."""

import re
import tomllib
from pathlib import Path

import llamafactory_hera

ROOT = Path(__file__).parents[2]
VERSION = llamafactory_hera.__version__


def _project(file: str) -> dict:
    return tomllib.loads((ROOT / file).read_text())["project"]


def test_the_patches_have_the_version_of_the_core_and_the_patches_and_the_extra_require_it() -> None:
    patches, extras = _project("patches/pyproject.toml"), _project("pyproject.toml")["optional-dependencies"]
    assert (patches["version"], patches["dependencies"]) == (VERSION, [f"llamafactory-hera=={VERSION}"])
    assert f"llamafactory-hera-patches=={VERSION}" in extras["llamafactory"]


def test_the_changelog_opens_with_this_version() -> None:
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == VERSION


def test_both_distributions_have_the_same_license() -> None:
    assert (ROOT / "patches/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
